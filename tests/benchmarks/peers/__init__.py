"""Other packages, each measured by a script in a virtual environment of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

from timing import Result, Settings

_HERE = Path(__file__).resolve().parent

#: By name: what pip installs. Torch and OpenMM are those of this interpreter.
PEERS: dict[str, tuple[str, ...]] = {
    "jaxmd": ("jax-md",),
    # Its forces need nothing that it depends on, which is large.
    "torchmd": ("--no-deps", "torchmd"),
    "torchpme": ("torch-pme", "vesin"),
}


def measure_peer(name: str, settings: Settings) -> Iterator[Result]:
    """Install a peer if need be and run its script; every failure becomes a remark."""
    try:
        python = _environment(name)
        passed = {
            "threads": settings.threads,
            "repeats": settings.repeats,
            "quick": settings.quick,
        }
        # Some peers start threads when they are imported.
        variables = {"OMP_NUM_THREADS": str(settings.threads), "PYTHONPATH": str(_HERE.parent)}
        done = subprocess.run(
            [str(python), str(_HERE / f"with_{name}.py"), json.dumps(passed)],
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
            env=os.environ | variables,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise RuntimeError(last[0])
        for fields in json.loads(done.stdout.splitlines()[-1]):
            yield Result(**fields)
    except (OSError, RuntimeError, ValueError, IndexError, subprocess.SubprocessError) as error:
        note = f"not run: {error}"
        yield Result(row=f"peer {name}", work="", threads=settings.threads, note=note[:300])


def _environment(name: str) -> Path:
    """Interpreter of the peer's environment, which is made on first use."""
    # Another interpreter, or another version of its packages, gets another environment.
    key = hashlib.sha256(f"{sys.prefix} {sys.version} {PEERS[name]}".encode()).hexdigest()[:10]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "mdgraft-benchmarks" / f"{name}-{key}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = folder / "ready"
    if ready.exists():
        return python
    print(f"installing {name} into {folder}", file=sys.stderr, flush=True)
    venv.create(folder, clear=True, with_pip=True)
    # Packages of this interpreter come after its own: the same torch and OpenMM on both sides.
    found = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    own = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (Path(found.stdout.strip()) / "parent.pth").write_text("\n".join(own) + "\n", encoding="utf-8")
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *PEERS[name]],
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
