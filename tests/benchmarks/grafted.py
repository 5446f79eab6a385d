"""mdgraft's side: the grafted potential and its derivatives."""

from __future__ import annotations

import mdgraft
import numpy as np
import openmm
import torch
from engine import Engine
from systems import Case
from timing import Settings


class Graft:
    """A potential with positions and box to differentiate by.

    Parameters
    ----------
    source
        The Context of an engine is grafted, so that both sides have the same PME mesh; or a System.
    case
        The system.
    settings
        Precision and device.
    virial
        Whether to differentiate by the box as well.
    """

    def __init__(
        self,
        source: Engine | openmm.System,
        case: Case,
        settings: Settings,
        virial: bool = True,
    ) -> None:
        self.virial = virial
        self.dtype = getattr(torch, settings.dtype)
        self.device = settings.device
        host = source.context if isinstance(source, Engine) else source
        self.potential = mdgraft.graft(host, dtype=self.dtype, device=self.device)
        self.case = case
        self.place(case.positions)
        self.direction = self._tensor(np.random.default_rng(2).normal(size=case.positions.shape))

    def _tensor(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.tensor(numbers, dtype=self.dtype, device=self.device)

    def place(self, positions: np.ndarray) -> None:
        """Move the atoms and forget derivatives."""
        self.positions = self._tensor(positions).requires_grad_()
        box = self.case.box
        self.box = None if box is None else self._tensor(box).requires_grad_(self.virial)
        self.potential.zero_grad()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def everything(self) -> float:
        """Energy, forces, gradients of all parameters, and of the box unless it was left out."""
        energy = self.potential(self.positions, self.box)
        energy.backward()
        self._wait()
        return energy.item()

    def energy_forces(self) -> None:
        """Energy and forces alone."""
        box = None if self.box is None else self.box.detach()
        torch.autograd.grad(self.potential(self.positions, box), self.positions)
        self._wait()

    def hessian_vector(self) -> None:
        """The Hessian times a direction."""
        box = None if self.box is None else self.box.detach()
        slope = (self.potential.forces(self.positions, box) * self.direction).sum()
        torch.autograd.grad(slope, self.positions)
        self._wait()
