"""What a user waits for before the first energy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mdgraft
import openmm
import systems
from timing import Result, Settings, alternate

_IMPORT = """
import time
import torch
begin = time.perf_counter()
import mdgraft
print(time.perf_counter() - begin)
"""

# The adapter, and kernels that are compiled or loaded, only come with the first use.
_FIRST = """
import time
import systems
import torch
case = systems.water_3k()
begin = time.perf_counter()
import mdgraft
potential = mdgraft.graft(case.system)
positions = torch.tensor(case.positions, requires_grad=True)
potential(positions, torch.tensor(case.box, requires_grad=True)).backward()
print(time.perf_counter() - begin)
"""


def startup(settings: Settings) -> Iterator[Result]:
    """Seconds to import the package when torch is there already, and to graft the protein."""
    repeats = min(settings.repeats, 5)
    # The first process reads files from the disk.
    seconds = [_in_subprocess(_IMPORT) for _ in range(repeats + 1)][1:]
    yield Result(row="startup import", work="import mdgraft, after torch", ours=seconds, target=0.3)
    seconds = [_in_subprocess(_FIRST) for _ in range(repeats + 1)][1:]
    yield Result(
        row="startup first",
        work="import, graft, first E, F, all dE/dp",
        atoms=systems.water_3k().n_atoms,
        dtype="float64",
        ours=seconds,
    )
    case = systems.protein(settings.quick, settings.output, settings.protein_file)
    platform = openmm.Platform.getPlatformByName("CPU")
    found = alternate(
        lambda count: None,
        {
            "theirs": lambda: openmm.Context(case.system, openmm.VerletIntegrator(1e-3), platform),
            "ours": lambda: mdgraft.graft(case.system),
        },
        repeats,
    )
    yield Result(
        row="startup graft",
        work="mdgraft.graft(System)",
        atoms=case.n_atoms,
        dtype="float64",
        ours=found["ours"],
        target=5.0,
        extra={"openmm_context_seconds": found["theirs"]},
    )


def _in_subprocess(code: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    return float(done.stdout)
