"""Energies by a calculator, as Monte Carlo wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mdgraft import InvalidInputError, MissingBoxError
from mdgraft.montecarlo import ChainState
from torch import Tensor

from mdgraft_ase._adapter import as_host
from mdgraft_ase._engine import CalculatorEngine
from mdgraft_ase._held import held_by
from mdgraft_ase._units import periods


class CalculatorEnergy:
    """The potential energy of a calculator, for `mdgraft.montecarlo.Target`.

    The fastest way to have ASE evaluate: the energy and nothing else, without torch. For gradients
    of averages hand the samples to an `Ensemble` with a `Potential` of the same calculator
    (``samples.to_ensemble(mdgraft.graft(atoms))``).

    Parameters
    ----------
    atoms
        ``ase.Atoms`` with a calculator, or a calculator that has seen its atoms. Neither is
        changed: the energy has copies of its own, unless the calculator cannot be copied. Energies
        are the force-consistent ones (``free_energy``) where the calculator has them. What the
        atoms' constraints hold is known to moves.

    Raises
    ------
    InvalidInputError
        If a calculator or atoms are missing.
    """

    def __init__(self, atoms: Any) -> None:
        structure, calculator = as_host(atoms)
        self._engine = CalculatorEngine(structure, calculator, settings=())
        #: Whether it depends on the box.
        self.periodic = any(periods(structure))
        self.n_particles = len(structure)
        #: Constrained distances and particles that stay in place, or None.
        self.held = held_by(structure)

    def __call__(self, state: ChainState) -> Tensor:
        """Energies ``(C,)`` [kJ/mol], float64, one chain after the other."""
        found = torch.from_numpy(self.energies_of_arrays(*state.arrays()))
        return found.to(state.positions.device)

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        """Energies ``(C,)`` [kJ/mol] of ``(C, N, 3)`` and ``(C, 3, 3)`` [nm], float64."""
        energies = np.empty(len(positions))
        self._evaluation(positions, boxes, energies)()
        return energies

    def bound(
        self, positions: np.ndarray, boxes: np.ndarray | None, energies: np.ndarray
    ) -> Callable[[], None]:
        """Evaluation of arrays that change in place, for many calls.

        Parameters
        ----------
        positions, boxes
            ``(C, N, 3)`` and ``(C, 3, 3)`` or None [nm], float64.
        energies
            ``(C,)`` [kJ/mol], float64, where results go.

        Returns
        -------
        callable
            A function of nothing that evaluates what ``positions`` hold when it is called.

        Raises
        ------
        InvalidInputError
            For another number of particles than that of the atoms.
        MissingBoxError
            If the atoms are periodic and there are no boxes.
        SimulationError
            By the function that is returned, if the calculator fails.
        """
        return self._evaluation(positions, boxes, energies)

    def _evaluation(
        self, positions: np.ndarray, boxes: np.ndarray | None, energies: np.ndarray
    ) -> Callable[[], None]:
        # Apart from `bound`, which a subclass may make of `energies_of_arrays` or the reverse.
        cells = self._cells(positions, boxes)
        energy = self._engine.energy

        def evaluate() -> None:
            for c, x in enumerate(positions):
                energies[c] = energy(x, None if cells is None else cells[c])

        return evaluate

    def energies_and_forces(self, state: ChainState) -> tuple[Tensor, Tensor]:
        """Energies ``(C,)`` [kJ/mol] and forces ``(C, N, 3)`` [kJ/mol/nm], float64."""
        positions, boxes = state.arrays()
        cells = self._cells(positions, boxes)
        arrays = [positions, np.zeros((len(positions), 0, 3)) if cells is None else cells]
        (slopes, *_), energies = (
            self._engine.gradients(arrays, [True, False]),
            self._engine.energies(arrays),
        )
        assert slopes is not None
        device = state.positions.device
        return torch.from_numpy(energies).to(device), torch.from_numpy(-slopes).to(device)

    def _cells(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray | None:
        """The boxes if they matter, after checks."""
        if positions.shape[1] != self.n_particles:
            raise InvalidInputError(
                f"state: has {positions.shape[1]} particles, the atoms {self.n_particles}"
            )
        if not self.periodic:
            return None
        if boxes is None:
            raise MissingBoxError("state: has no box, but the atoms are periodic; pass box=")
        return boxes
