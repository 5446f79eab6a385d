"""Time and memory for each atom as the system grows."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mdgraft
import systems
import torch
from engine import Engine
from grafted import Graft
from memory import available, peak, present, restart_peak
from systems import Case
from timing import Moves, Result, Settings, alternate, described

_SIDES = (10, 20, 40, 63, 100)
_QUICK_SIDES = (10, 20, 40)


def growth(settings: Settings) -> Iterator[Result]:
    """Lennard-Jones fluids of 1,000 to 1,000,000 atoms, each in a process of its own."""
    bytes_per_atom = 0.0
    for n_side in _QUICK_SIDES if settings.quick else _SIDES:
        n_atoms = n_side**3
        common = described(settings, row="growth", atoms=n_atoms, moves="rebuild")
        common |= {"work": "E, F, all dE/dp, virial", "beside": "OpenMM CPU: E, F"}
        needed, free = bytes_per_atom * n_atoms, available()
        if needed > 0.7 * free:
            # Running out of memory would take other programs along.
            note = f"not run: needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
            yield Result(**common, note=note)
            continue
        found = _in_subprocess(settings, n_side)
        if "note" in found:
            yield Result(**common, note=found["note"])
            continue
        bytes_per_atom = found["peak_bytes"] / n_atoms
        seconds = sorted(found["ours"])[len(found["ours"]) // 2]
        note = (
            f"{1e6 * seconds / n_atoms:.2f} us/atom, {bytes_per_atom / 1e3:.1f} kB/atom, "
            f"peak {found['peak_bytes'] / 1e6:.0f} MB"
        )
        extra = {
            "seconds_per_atom": seconds / n_atoms,
            "peak_bytes": found["peak_bytes"],
            "held_bytes": found["held_bytes"],
        }
        yield Result(**common, ours=found["ours"], theirs=found["theirs"], note=note, extra=extra)


def _in_subprocess(settings: Settings, n_side: int) -> dict[str, Any]:
    passed = {"threads": settings.threads, "dtype": settings.dtype, "n_side": n_side}
    passed["repeats"] = min(settings.repeats, 2 if settings.quick else 3)
    done = subprocess.run(
        [sys.executable, "-c", "from rows.growth import child; child()", json.dumps(passed)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"note": f"failed: {last[0]}"}


def child() -> None:
    """Measure one size and print JSON; memory first, while OpenMM has no Context yet."""
    passed = json.loads(sys.argv[1])
    n_side = passed.pop("n_side")
    settings = dataclasses.replace(Settings(), **passed)
    torch.set_num_threads(settings.threads)
    dtype = getattr(torch, settings.dtype)
    # Code that the first evaluation loads or compiles is no part of the system's memory.
    evaluate(systems.lennard_jones(6), dtype)
    before = restart_peak()
    case = systems.lennard_jones(n_side)
    held = evaluate(case, dtype) - before
    highest = peak() - before
    engine = Engine(case, "CPU", settings.threads)
    graft = Graft(engine, case, settings)
    moves = Moves(case.positions, "rebuild")

    def prepare(count: int) -> None:
        placed = moves(count)
        engine.place(placed)
        graft.place(placed)

    found = alternate(
        prepare, {"theirs": engine.energy_forces, "ours": graft.everything}, settings.repeats
    )
    print(json.dumps(found | {"peak_bytes": highest, "held_bytes": held}))


def evaluate(case: Case, dtype: torch.dtype) -> int:
    """Energy and all gradients; returns the memory that was resident before [bytes]."""
    potential = mdgraft.graft(case.system, dtype=dtype)
    positions = torch.tensor(case.positions, dtype=dtype, requires_grad=True)
    box = torch.tensor(case.box, dtype=dtype, requires_grad=True)
    held = present()
    potential(positions, box).backward()
    return held
