"""Bonds, angles and torsions whose energy is an expression of one internal coordinate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm
from mdgraft.potentials.custom.points import measure
from mdgraft.potentials.term import AbstractTerm

_COORDINATES = {2: ("distance", "r"), 3: ("angle", "theta"), 4: ("dihedral", "theta")}


class CustomBonded(AbstractCustomTerm):
    """A sum over bonds, angles or torsions of an expression of ``r`` or ``theta``.

    Parameters
    ----------
    energy
        Expression [kJ/mol] of ``r`` [nm] for two particles, or of ``theta`` [radian] for three or
        four, and of per-item and global parameters.
    particles
        ``(items, 2)``, ``(items, 3)`` or ``(items, 4)`` indices.
    parameters
        Values ``(items,)`` of each per-item parameter by name.
    global_names
        Global parameters that the expression may use.
    periodic
        Whether distances are those of nearest periodic images.
    where
        What errors call the expression.

    Raises
    ------
    InvalidInputError
        If the expression is one that OpenMM refuses.
    """

    particles: Tensor

    def __init__(
        self,
        energy: str,
        particles: Tensor,
        parameters: Mapping[str, Tensor],
        *,
        global_names: Sequence[str] = (),
        periodic: bool = False,
        where: str = "energy",
    ) -> None:
        super().__init__(parameters, global_names=global_names, periodic=periodic)
        self.register_buffer("particles", particles)
        self.coordinate, self.variable = _COORDINATES[particles.shape[1]]
        self.energy = Expression(
            energy, variables=(self.variable, *parameters, *global_names), where=where
        )

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        coordinate = measure(self.coordinate, positions, box, self.particles)
        variables = (
            self.shared_values(global_values)
            | self.item_values(values)
            | {self.variable: coordinate}
        )
        return per_frame(self, self.energy(variables), coordinate, values)


def per_frame(
    term: AbstractTerm, energies: Tensor, example: Tensor, values: Mapping[str, Tensor]
) -> Tensor:
    """Sum of energies that broadcast to ``example`` ``(frames, items)``.

    What the expression happens not to use has zero derivatives, not missing ones.
    """
    total = energies.expand_as(example).sum(dim=-1)
    for value in values.values():
        # The sum of nothing, which stays zero where a value is infinite.
        total = total + value.flatten()[:0].sum()
    result: Tensor = total + 0.0 * example.sum(dim=-1)
    return result
