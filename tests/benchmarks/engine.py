"""OpenMM's side: a Context that computes energies and forces."""

from __future__ import annotations

import numpy as np
import openmm
from systems import Case
from timing import Settings


class Engine:
    """A Context of OpenMM.

    Parameters
    ----------
    case
        The system.
    platform
        ``"CPU"``, ``"Reference"`` or ``"CUDA"``.
    threads
        For the CPU platform.
    """

    def __init__(self, case: Case, platform: str, threads: int = 1) -> None:
        properties = {"CPU": {"Threads": str(threads)}, "CUDA": {"Precision": "mixed"}}
        self.context = openmm.Context(
            case.system,
            openmm.VerletIntegrator(0.001),
            openmm.Platform.getPlatformByName(platform),
            properties.get(platform, {}),
        )
        self.context.setPositions(case.positions)

    def place(self, positions: np.ndarray) -> None:
        """Move the atoms."""
        self.context.setPositions(positions)

    def energy_forces(self) -> openmm.State:
        """Energy and forces."""
        return self.context.getState(energy=True, forces=True)

    def energy(self) -> float:
        """Energy alone [kJ/mol]."""
        return self.context.getState(energy=True).getPotentialEnergy()._value

    def loop(self, frames: np.ndarray) -> np.ndarray:
        """Energies ``(F,)`` and forces of frames, as fast as a loop in Python does it."""
        energies = np.empty(len(frames))
        forces = np.empty_like(frames)
        for f, positions in enumerate(frames):
            self.context.setPositions(positions)
            state = self.context.getState(energy=True, forces=True)
            energies[f] = state.getPotentialEnergy()._value
            forces[f] = state.getForces(asNumpy=True)._value
        return energies

    def energies(self, frames: np.ndarray) -> np.ndarray:
        """Energies ``(F,)`` of frames."""
        found = np.empty(len(frames))
        for f, positions in enumerate(frames):
            self.context.setPositions(positions)
            found[f] = self.energy()
        return found


def platform_of(settings: Settings) -> str:
    """OpenMM's platform for the same device."""
    return "CUDA" if settings.device == "cuda" else "CPU"


def disagreement(ours: float, theirs: float) -> str:
    """A remark if both sides have not computed the same energy."""
    if abs(ours - theirs) <= 1e-3 * max(abs(ours), abs(theirs), 1.0):
        return ""
    return f"energies differ: {ours:.6g} and {theirs:.6g} kJ/mol"
