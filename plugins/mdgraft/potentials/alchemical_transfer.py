"""The alchemical transfer method: one energy of a system and of a displaced copy of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft._units import NANOMETER
from mdgraft.kernels.observe import observe
from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm, parameter_key
from mdgraft.potentials.term import AbstractTerm

# What OpenMM puts in the place of an energy that overflows: the largest single-precision number.
_LARGEST = torch.finfo(torch.float32).max


class AlchemicalTransfer(AbstractCustomTerm):
    """An expression of the energies ``u0`` and ``u1`` of two displaced copies of the positions.

    An energy that is not finite is replaced by the largest number in single precision, with zero
    derivatives, which matters only where the expression does not depend on it.

    Parameters
    ----------
    energy
        Expression [kJ/mol] of ``u0``, ``u1`` and global parameters.
    terms
        Terms that make up ``u0`` and ``u1``, by name; their parameters become
        ``<name>.<parameter>``.
    displacement0, displacement1
        ``(N, 3)`` [nm] in the initial and in the target state.
    destinations, origins
        ``(N, 2)`` for both states: a particle whose entries are not negative is displaced by the
        vector from origin to destination instead.
    global_names
        Global parameters that the expression may use.
    where
        What errors call the expression.

    References
    ----------
    E. Gallicchio et al., J. Comput. Chem. 44, 1153 (2023).
    """

    # Whether an energy is finite decides what is computed.
    replays = False

    destinations: Tensor
    origins: Tensor

    def __init__(
        self,
        energy: str,
        terms: Mapping[str, AbstractTerm],
        *,
        displacement0: Tensor,
        displacement1: Tensor,
        destinations: Tensor,
        origins: Tensor,
        global_names: Sequence[str] = (),
        where: str = "energy",
    ) -> None:
        periodic = any(term.periodic for term in terms.values())
        super().__init__({}, global_names=global_names, periodic=periodic)
        for name, term in terms.items():
            self.add_term(parameter_key(name), term)
        self.register_buffer("destinations", destinations)
        self.register_buffer("origins", origins)
        self.add_parameter("displacement0", displacement0, NANOMETER)
        self.add_parameter("displacement1", displacement1, NANOMETER)
        self.energy = Expression(energy, variables=("u0", "u1", *global_names), where=where)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        variables = self.shared_values(global_values)
        for state in (0, 1):
            moved = positions + self._displacements(state, positions, values)
            energy = self._inner(moved, box, values, global_values)
            finite = torch.isfinite(energy)
            if not bool(observe(_all_finite, lambda found, _: found.all(), energy)):
                # A mask alone would turn infinite derivatives into NaN.
                moved = torch.where(finite[:, None, None], moved, positions)
                energy = self._inner(moved, box, values, global_values)
            variables[f"u{state}"] = torch.where(finite, energy, _LARGEST)
        result = self.energy(variables)
        # Both states count, whichever the expression uses.
        return result.expand_as(variables["u0"]) + 0.0 * (
            values["displacement0"].sum() + values["displacement1"].sum()
        )

    def _inner(
        self,
        moved: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of the terms inside ``(frames,)``."""
        energy = 0.0 * moved.sum(dim=(-2, -1))
        for name, term in self.inner_terms().items():
            cell = box if term.periodic else None
            energy = energy + term(moved, cell, self.inner_values(name, values), global_values)
        return energy

    def _displacements(self, state: int, positions: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """``(frames, N, 3)`` in one of the states."""
        fixed = values[f"displacement{state}"].expand_as(positions)
        to, by = self.destinations[:, state], self.origins[:, state]
        offset = positions[:, to.clamp(min=0)] - positions[:, by.clamp(min=0)]
        # The target state says which kind of displacement a particle has.
        kind = (self.destinations[:, 1] >= 0) & (self.origins[:, 1] >= 0)
        here = ((to >= 0) & (by >= 0)).unsqueeze(-1)
        return torch.where(kind.unsqueeze(-1), torch.where(here, offset, 0.0), fixed)


def _all_finite(energy: Tensor) -> Tensor:
    return torch.isfinite(energy).all()
