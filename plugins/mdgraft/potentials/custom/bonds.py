"""Bonds, angles and torsions whose energy is an expression of one internal coordinate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm
from mdgraft.potentials.custom.compiled_items import CompiledItems
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
        n_particles = particles.shape[1]
        self._compiled = CompiledItems(
            self.energy,
            item=tuple(parameters),
            shared=self.global_names,
            measures={self.variable: (self.coordinate, tuple(range(n_particles)))},
            n_particles=n_particles,
            periodic=periodic,
        )

    @property
    def framewise(self) -> bool:
        """Whether `torch.vmap` over frames costs about what a batch of frames costs."""
        return self._compiled.serve_frames(self.particles)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        quantities = self.shared_values(global_values) | self.item_values(values)
        if self._compiled.serve(positions, len(self.particles)):
            return self._compiled.energy(positions, box, self.particles, quantities, self._plain)
        return self._plain(positions, box, quantities, values)

    def _plain(
        self,
        positions: Tensor,
        box: Tensor | None,
        quantities: Mapping[str, Tensor],
        values: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Energy of each frame by plain torch operations."""
        coordinate = measure(self.coordinate, positions, box, self.particles)
        energies = self.energy({**quantities, self.variable: coordinate})
        return per_frame(self, energies, coordinate, values or {})


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
