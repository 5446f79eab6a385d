"""What openmm-torch is installed, found out without importing it."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

_NAME = "openmmtorch"


def plugin_version() -> str | None:
    """Its version, or ``"of unknown version"``; None if it is not installed."""
    if importlib.util.find_spec(_NAME) is None:
        return None
    try:
        return version(_NAME)
    except PackageNotFoundError:
        return "of unknown version"


def is_released_wheel() -> bool:
    """Whether it is the wheel that was released, rather than a build for the torch that is here."""
    try:
        return "manylinux" in (distribution(_NAME).read_text("WHEEL") or "")
    except PackageNotFoundError:
        return False


def defines(name: str) -> bool:
    """Whether it has a class; its version does not tell, which builds from source share."""
    spec = importlib.util.find_spec(_NAME)
    if spec is None or spec.origin is None:
        return False
    return f"class {name}(" in Path(spec.origin).read_text(encoding="utf-8")
