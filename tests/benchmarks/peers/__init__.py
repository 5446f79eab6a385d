"""Other packages, each measured by a script in a virtual environment of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from timing import Result, Settings

_HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another package.

    Attributes
    ----------
    installed
        Arguments of pip. Torch, OpenMM and mdgraft are those of this interpreter.
    scripts
        By row: the script that measures it.
    """

    installed: tuple[str, ...]
    scripts: dict[str, str]


PEERS: dict[str, Peer] = {
    "jaxmd": Peer(("jax-md",), {"lj-10k": "with_jaxmd.py", "dhfr": "with_jaxmd_protein.py"}),
    # Its forces need nothing that it depends on, which is large.
    "torchmd": Peer(("--no-deps", "torchmd"), {"lj-2k": "with_torchmd.py"}),
    "torchpme": Peer(("torch-pme", "vesin"), {"water-3k": "with_torchpme.py"}),
}

#: All rows of all peers.
PEER_ROWS = sorted({row for peer in PEERS.values() for row in peer.scripts})


def measure_peer(
    name: str, settings: Settings, only: Collection[str] | None = None
) -> Iterator[Result]:
    """Install a peer if need be and measure its rows; every failure becomes a remark."""
    for row, script in PEERS[name].scripts.items():
        if only is not None and row not in only:
            continue
        try:
            for fields in _measured(_environment(name), script, settings):
                yield Result(**fields)
        except (OSError, RuntimeError, ValueError, IndexError, subprocess.SubprocessError) as error:
            note = f"not run: {error}"
            row = f"peer {name} {row}"
            yield Result(row=row, work="", threads=settings.threads, note=note[:300])


def _measured(python: Path, script: str, settings: Settings) -> list[dict[str, Any]]:
    """Fields of results, from a script that runs in the peer's environment."""
    passed = {
        "threads": settings.threads,
        "repeats": settings.repeats,
        "quick": settings.quick,
        "output": str(settings.output.resolve()),
        "protein": None if settings.protein_file is None else str(settings.protein_file.resolve()),
    }
    # Some peers start threads when they are imported.
    variables = {"OMP_NUM_THREADS": str(settings.threads), "PYTHONPATH": str(_HERE.parent)}
    done = subprocess.run(
        [str(python), str(_HERE / script), json.dumps(passed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
        env=os.environ | variables,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(last[0])
    return json.loads(done.stdout.splitlines()[-1])


def _environment(name: str) -> Path:
    """Interpreter of the peer's environment, which is made on first use."""
    # Another interpreter, or another version of its packages, gets another environment.
    installed = PEERS[name].installed
    own = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    # Packages of this interpreter come after the peer's own: the same torch and OpenMM on both
    # sides. Added as a site, since mdgraft may be installed there by a file with its path.
    text = "".join(f"import site; site.addsitedir({path!r})\n" for path in own)
    key = hashlib.sha256(f"{sys.version} {text} {installed}".encode()).hexdigest()[:10]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "mdgraft-benchmarks" / f"{name}-{key}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = folder / "ready"
    if ready.exists():
        return python
    print(f"installing {name} into {folder}", file=sys.stderr, flush=True)
    venv.create(folder, clear=True, with_pip=True)
    found = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(found.stdout.strip()) / "parent.pth").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *installed],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
        raise RuntimeError(f"cannot be installed: {last[0]}")
    ready.touch()
    return python
