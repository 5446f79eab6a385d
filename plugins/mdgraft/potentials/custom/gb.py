"""Energies of values that each particle gathers from its neighbours."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from mdgraft.kernels.pairs import exclusion_keys
from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm, Tables
from mdgraft.potentials.custom.pairwise import (
    OrderedPairs,
    list_pairs,
    measure,
    particle_and_pair_names,
)
from mdgraft.potentials.nonbonded import Method


class Computation(enum.Enum):
    """What a computed value or an energy is summed over."""

    SINGLE_PARTICLE = enum.auto()
    PARTICLE_PAIR = enum.auto()
    PARTICLE_PAIR_NO_EXCLUSIONS = enum.auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A computed value or an energy term.

    Attributes
    ----------
    expression
        In Lepton's language.
    computation
        Single particles, or pairs.
    name
        Of a computed value; empty for an energy term.
    """

    expression: str
    computation: Computation
    name: str = ""


class CustomGB(AbstractCustomTerm):
    r"""Energies of computed values, as generalised Born models need them.

    Values are computed one after the other, each from parameters and the values before it:
    ``v_i = sum_j f(r_ij, p_i, p_j)`` over pairs, where particle 1 is ``i``, or
    ``v_i = f(x_i, y_i, z_i, p_i)``. The energy is a sum of terms over pairs (each pair once) or
    single particles. Expressions of single particles see the positions as they are, not wrapped
    into the box.

    Parameters
    ----------
    parameters
        ``(N,)`` by name.
    computed_values, energy_terms
        In the order of evaluation.
    exclusions
        ``(exclusions, 2)`` particle indices.
    method, cutoff
        One of the methods without Ewald sums, and its cutoff [nm].
    global_names, tables
        See `AbstractCustomTerm`.
    where
        What errors call the force.
    """

    excluded: Tensor
    not_excluded: Tensor

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        n_particles: int,
        computed_values: Sequence[Step],
        energy_terms: Sequence[Step],
        exclusions: Tensor,
        method: Method,
        cutoff: float = math.inf,
        global_names: Sequence[str] = (),
        tables: Tables | None = None,
        where: str = "CustomGBForce",
    ) -> None:
        super().__init__(
            parameters, global_names=global_names, tables=tables, periodic=method.periodic
        )
        self.n_particles, self.method, self.cutoff = n_particles, method, cutoff
        self.computed_values, self.energy_terms = tuple(computed_values), tuple(energy_terms)
        keys = exclusion_keys(exclusions, n_particles)
        self.register_buffer("excluded", keys, persistent=False)
        self.register_buffer("not_excluded", keys.new_zeros(0), persistent=False)
        names = list(self.item_keys)
        self._values: list[Expression] = []
        self._energies: list[Expression] = []
        for step in self.computed_values:
            self._values.append(self._parse(step, names, f"{where}.{step.name}"))
            names.append(step.name)
        for k, step in enumerate(self.energy_terms):
            self._energies.append(self._parse(step, names, f"{where}.energy_term_{k}"))

    def _parse(self, step: Step, names: Sequence[str], where: str) -> Expression:
        if step.computation is Computation.SINGLE_PARTICLE:
            allowed = {"x", "y", "z", *names}
        else:
            allowed = {"r", *particle_and_pair_names(names)}
        return Expression(
            step.expression,
            variables=allowed | set(self.global_names),
            functions=self.arities,
            where=where,
        )

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        n_frames, shape = positions.shape[0], positions.shape[:2]
        shared, functions = self.shared_values(global_values), self.functions(values)
        lists: dict[Computation, OrderedPairs] = {}
        particle = dict(self.item_values(values))
        x, y, z = positions.unbind(-1)

        def pairs_of(step: Step) -> OrderedPairs:
            if step.computation not in lists:
                lists[step.computation] = self._pairs(positions, box, step.computation)
            return lists[step.computation]

        def evaluate(expression: Expression, pairs: OrderedPairs | None) -> Tensor:
            if pairs is None:
                variables = {"x": x, "y": y, "z": z} | particle
            else:
                variables = pairs.variables(particle, expression.variables)
            return expression(shared | variables, functions, like=positions)

        for step, expression in zip(self.computed_values, self._values, strict=True):
            if step.computation is Computation.SINGLE_PARTICLE:
                result = evaluate(expression, None).expand(shape)
            else:
                pairs = pairs_of(step)
                result = positions.new_zeros(())
                for ordered in (pairs, pairs.swapped()):
                    shares = evaluate(expression, ordered)
                    result = result + ordered.sum_at_first(shares, self.n_particles)
            particle[step.name] = result
        energy = 0.0 * positions.sum(dim=(-2, -1))
        for step, expression in zip(self.energy_terms, self._energies, strict=True):
            if step.computation is Computation.SINGLE_PARTICLE:
                energy = energy + evaluate(expression, None).expand(shape).sum(dim=-1)
            else:
                pairs = pairs_of(step)
                energy = energy + pairs.sum(evaluate(expression, pairs))
        assert energy.shape == (n_frames,)
        return energy

    def _pairs(
        self, positions: Tensor, box: Tensor | None, computation: Computation
    ) -> OrderedPairs:
        skipped = self.excluded if computation is Computation.PARTICLE_PAIR else self.not_excluded
        pairs = list_pairs(positions, box, skipped, method=self.method, cutoff=self.cutoff)
        return measure(pairs, positions, box, method=self.method, cutoff=self.cutoff)
