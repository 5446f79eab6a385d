"""Trying things in a child process, since broken combinations can end the process they run in."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

TIMEOUT = 120.0  # [s] a first start with a cold disk is slow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """How a probe ended.

    Attributes
    ----------
    ok
        Whether it ran to its end.
    answer
        The JSON object in its last line.
    error
        What went wrong, in one line.
    """

    ok: bool
    answer: dict[str, Any]
    error: str


def run_trial(code: str, timeout: float = TIMEOUT) -> Trial:
    """Run a program that prints one line of JSON last; whatever is said before it is ignored."""
    # A file, since TorchScript wants to read the source; in a folder that shadows no module.
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "probe.py"
        script.write_text(code, encoding="utf-8")
        command = [sys.executable, "-W", "ignore", str(script)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Trial(ok=False, answer={}, error=f"no answer within {timeout:g} s")
    if done.returncode == 0:
        try:
            answer = json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            return Trial(ok=False, answer={}, error="ended without an answer")
        return Trial(ok=True, answer=answer, error="")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        last = f"the process dies ({name}): {last}"
    elif "symbol lookup error" in last:
        # The loader ends the process with a code, not with a signal.
        last = f"the process dies: {last}"
    return Trial(ok=False, answer={}, error=textwrap.shorten(last, 300))


# Probes on an OpenMM platform: each sets ENERGY and FORCE, the first component of the first force.

SYSTEM = """
import json, openmm
PRECISIONS = ["single"]
system = openmm.System()
for _ in range(2):
    system.addParticle(1.0)
"""
ENERGY = """
platform = openmm.Platform.getPlatformByName(NAME)
for precision in PRECISIONS if "Precision" in platform.getPropertyNames() else [""]:
    properties = {"Precision": precision} if precision else {}
    try:
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform, properties)
    except openmm.OpenMMException:
        # Not every device has it.
        if precision == "double":
            continue
        raise
    context.setPositions([[0.0, 0.0, 0.0], [0.3, 0.4, 0.0]])
    for _ in range(10):
        state = context.getState(energy=True, forces=True)
    energy = state.getPotentialEnergy()._value
    force = state.getForces()[0]._value[0]
    assert abs(energy - ENERGY) < 1e-4 and abs(force - FORCE) < 1e-3, (precision, energy, force)
print(json.dumps({"energy": energy}))
"""
_TORCH = (
    """
import torch, openmmtorch
class Energy(torch.nn.Module):
    def forward(self, positions):
        return 8 * ((positions[1] - positions[0]) ** 2).sum()
class Periodic(torch.nn.Module):
    def forward(self, positions, box):
        return 8 * ((positions[1] - positions[0]) ** 2).sum() + box.sum()
"""
    + SYSTEM
)
#: With a box too, whose memory some builds give up, in double precision, before it is read.
TORCH_FORCE = (
    _TORCH
    + """
PRECISIONS = ["single", "double"]
system.setDefaultPeriodicBoxVectors([2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0])
system.addForce(openmmtorch.TorchForce(torch.jit.script(Energy())))
periodic = openmmtorch.TorchForce(torch.jit.script(Periodic()))
periodic.setUsesPeriodicBoundaryConditions(True)
system.addForce(periodic)
ENERGY, FORCE = 10.0, 9.6
"""
    + ENERGY
)
#: OpenMM copies the forces that another one holds.
TORCH_FORCE_COPIED = (
    _TORCH
    + """
outer = openmm.CustomCVForce("2*v")
outer.addCollectiveVariable("v", openmmtorch.TorchForce(torch.jit.script(Energy())))
system.addForce(outer)
ENERGY, FORCE = 4.0, 9.6
"""
    + ENERGY
)
PYTHON_TORCH_FORCE = (
    _TORCH
    + """
def compute(state, positions):
    x = positions.detach().requires_grad_()
    energy = Energy()(x)
    (slope,) = torch.autograd.grad(energy, x)
    return energy.detach(), -slope
system.addForce(openmmtorch.PythonTorchForce(compute, {}))
ENERGY, FORCE = 2.0, 4.8
"""
    + ENERGY
)
