"""What hosts do for the command line: looked up by name, imported on first use."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from mdgraft._errors import UnsupportedHostError

_GROUP = "mdgraft.services"


def service(host: str, name: str) -> Any:
    """Load a host's service, such as ``service("openmm", "check")``.

    Raises
    ------
    UnsupportedHostError
        If no installed adapter offers it, or more than one does.
    """
    available = entry_points(group=_GROUP)
    found = {entry.value: entry for entry in available if entry.name == f"{host}.{name}"}
    if len(found) != 1:
        raise UnsupportedHostError(
            f"host: {len(found)} adapters offer {name!r} for {host!r}; "
            f"on offer are {sorted({entry.name for entry in available})}"
        )
    return next(iter(found.values())).load()


def hosts_with(name: str) -> list[str]:
    """The hosts that offer a service, sorted."""
    available = entry_points(group=_GROUP)
    return sorted({e.name.partition(".")[0] for e in available if e.name.endswith(f".{name}")})
