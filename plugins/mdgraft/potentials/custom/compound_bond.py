"""Bonds between several particles or groups, with an expression of all their coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm, Tables, parameter_keys
from mdgraft.potentials.custom.bonds import per_frame
from mdgraft.potentials.custom.compiled_items import CompiledItems
from mdgraft.potentials.custom.points import (
    GEOMETRY,
    POINT_FUNCTIONS,
    coordinates,
    measure_calls,
    point_function,
)


class CustomCompoundBond(AbstractCustomTerm):
    """A sum over bonds of an expression of the coordinates of their particles.

    The expression may use ``x1``, ``y1``, ``z1``, ...; ``distance(p1, p2)``, ``angle(p1, p2, p3)``
    and ``dihedral(p1, p2, p3, p4)``; and ``pointdistance``, ``pointangle`` and ``pointdihedral`` of
    coordinates.

    Parameters
    ----------
    energy
        Expression [kJ/mol] of the above, of per-bond and global parameters.
    particles
        ``(bonds, particles)`` indices.
    parameters
        Values ``(bonds,)`` of each per-bond parameter by name.
    global_names
        Global parameters that the expression may use.
    tables
        Tabulated functions.
    periodic
        Whether distances are those of nearest periodic images.
    letter
        What labels start with.
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
        tables: Tables | None = None,
        periodic: bool = False,
        letter: str = "p",
        where: str = "energy",
    ) -> None:
        super().__init__(parameters, global_names=global_names, tables=tables, periodic=periodic)
        self.register_buffer("particles", particles)
        places = range(1, particles.shape[1] + 1)
        self.labels = tuple(f"{letter}{i}" for i in places)
        self.energy = Expression(
            energy,
            variables=(
                *(f"{axis}{i}" for i in places for axis in "xyz"),
                *parameters,
                *global_names,
            ),
            # A table cannot hide these, unlike functions of the language.
            functions=self.arities | POINT_FUNCTIONS,
            geometry=GEOMETRY,
            labels=self.labels,
            where=where,
        )
        self._compiled = CompiledItems(
            self.energy,
            item=tuple(parameters),
            shared=self.global_names,
            measures={
                call.key: (call.name, tuple(self.labels.index(a) for a in call.arguments))
                for call in self.energy.calls
            }
            | {
                f"{axis}{i}": (axis, (i - 1,))
                for i in places
                for axis in "xyz"
                if f"{axis}{i}" in self.energy.variables
            },
            n_particles=particles.shape[1],
            periodic=periodic,
        )

    @property
    def framewise(self) -> bool:
        """Whether `torch.vmap` over frames costs about what a batch of frames costs."""
        return self._compiled.serve_frames(self.particles)

    def centers(self, positions: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The points that bonds connect, ``(frames, n, 3)``."""
        return positions

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        points = self.centers(positions, values)
        quantities = self.shared_values(global_values) | self.item_values(values)
        if self._compiled.serve(positions, len(self.particles)):
            total = self._compiled.energy(points, box, self.particles, quantities, self._plain)
            for key in self.table_keys.values():
                # Nothing uses them, so their derivatives are zero.
                total = total + values[key].flatten()[:0].sum()
            return total
        return self._plain(points, box, quantities, values)

    def _plain(
        self,
        points: Tensor,
        box: Tensor | None,
        quantities: Mapping[str, Tensor],
        values: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Energy of each frame by plain torch operations."""
        variables = dict(quantities)
        variables |= coordinates(self.labels, points, self.particles, self.energy.variables)
        variables |= measure_calls(self.energy.calls, self.labels, points, box, self.particles)
        functions = self.functions(values) if values else {}
        functions |= {name: point_function(name, box) for name in POINT_FUNCTIONS}
        energies = self.energy(variables, functions, like=points)
        example = points.new_zeros(points.shape[0], self.particles.shape[0])
        unused = 0.0 * points.sum(dim=(-2, -1))
        return per_frame(self, energies, example, values or {}) + unused


class CustomCentroidBond(CustomCompoundBond):
    """`CustomCompoundBond` between the centres of groups of particles, ``g1``, ``g2``, ...

    Parameters
    ----------
    energy, parameters, global_names, tables, periodic, where
        As in `CustomCompoundBond`.
    groups
        ``(bonds, groups)`` indices of groups.
    members
        ``(members,)`` particle indices of all groups, one group after the other.
    group
        ``(members,)`` index of each member's group.
    masses
        ``(members,)`` weights of members whose group has none of its own, normally masses [Da].
    weighted
        ``(members,)`` whether the member's group has weights of its own.
    group_weights
        ``(members with weights,)`` these weights; they need not add up to one.
    n_groups
        Number of groups.
    """

    members: Tensor
    group: Tensor
    masses: Tensor
    weighted: Tensor

    def __init__(
        self,
        energy: str,
        groups: Tensor,
        parameters: Mapping[str, Tensor],
        *,
        members: Tensor,
        group: Tensor,
        masses: Tensor,
        weighted: Tensor,
        group_weights: Tensor,
        n_groups: int,
        global_names: Sequence[str] = (),
        tables: Tables | None = None,
        periodic: bool = False,
        where: str = "energy",
    ) -> None:
        super().__init__(
            energy,
            groups,
            parameters,
            global_names=global_names,
            tables=tables,
            periodic=periodic,
            letter="g",
            where=where,
        )
        for name, value in (
            ("members", members),
            ("group", group),
            ("masses", masses),
            ("weighted", weighted),
        ):
            self.register_buffer(name, value)
        self.n_groups = n_groups
        taken = [*self.item_keys, *self.table_keys]
        self.weight_key = parameter_keys([*taken, "group_weights"])[-1]
        if group_weights.numel():
            self.add_parameter(self.weight_key, group_weights, "dimensionless")

    @property
    def framewise(self) -> bool:
        """Whether `torch.vmap` over frames costs about what a batch of frames costs."""
        # Centres that differ between frames depend on weights.
        return self.weight_key not in self.units and super().framewise

    def centers(self, positions: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Weighted centres of the groups, ``(frames, groups, 3)``."""
        weights = self.masses
        if self.weight_key in values:
            own = values[self.weight_key]
            place = torch.cumsum(self.weighted, dim=0) - 1
            weights = torch.where(self.weighted, own[place.clamp(min=0)], weights)
        total = weights.new_zeros(self.n_groups).index_add(0, self.group, weights)
        share = (weights / total[self.group]).unsqueeze(-1)
        empty = positions.new_zeros(positions.shape[0], self.n_groups, 3)
        return empty.index_add(1, self.group, share * positions[:, self.members])
