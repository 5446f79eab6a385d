"""Energies of values that each particle gathers from its neighbours."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mdgraft.kernels.pairs import exclusion_keys
from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm, Tables
from mdgraft.potentials.custom.compiled_pairs import CompiledPairs
from mdgraft.potentials.custom.pairwise import (
    OrderedPairs,
    list_pairs,
    measure,
    particle_and_pair_names,
)
from mdgraft.potentials.nonbonded import Method

#: Times frames, as many pairs as two particles of a system that is worth compiling for.
_MANY_PAIRS = 4000


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
        self._expressions: list[Expression] = []
        #: One for each step, None for single particles.
        self._compiled: list[CompiledPairs | None] = []
        for k, step in enumerate(self._steps):
            place = step.name or f"energy_term_{k - len(self.computed_values)}"
            expression = self._parse(step, names, f"{where}.{place}")
            self._expressions.append(expression)
            self._compiled.append(self._compile(step, expression, names, exclusions))
            names += [step.name] if step.name else []

    @property
    def _steps(self) -> tuple[Step, ...]:
        return self.computed_values + self.energy_terms

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

    def _compile(
        self, step: Step, expression: Expression, names: Sequence[str], exclusions: Tensor
    ) -> CompiledPairs | None:
        if step.computation is Computation.SINGLE_PARTICLE:
            return None
        excluding = step.computation is Computation.PARTICLE_PAIR
        return CompiledPairs(
            expression,
            particle=list(dict.fromkeys(names)),
            shared=self.global_names,
            method=self.method,
            cutoff=self.cutoff,
            switched=False,
            exclusions=exclusions if excluding else exclusions[:0],
            n_particles=self.n_particles,
            framed={value.name for value in self.computed_values},
            tables=self.tabulated,
            gathered=bool(step.name),
        )

    @property
    def framewise(self) -> bool:
        """Whether `torch.vmap` over frames costs about what a batch of frames costs."""
        frame = torch.empty(1, 0, dtype=torch.float64, device=self.excluded.device)
        return all(
            one is None or one.serve(frame, n_particles=self._size(1)) for one in self._compiled
        )

    @property
    def collects(self) -> bool:
        """Whether its kernels tell all about a frame: effective radii depend on parameters."""
        return False

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
        entries = self.entries(values)
        particle = dict(self.item_values(values))
        x, y, z = positions.unbind(-1)
        lists: dict[Computation, OrderedPairs] = {}
        size = self._size(n_frames)
        energy = 0.0 * positions.sum(dim=(-2, -1))
        for step, expression, compiled in zip(
            self._steps, self._expressions, self._compiled, strict=True
        ):
            plain = functools.partial(self._over_pairs, step, expression)
            if compiled is None:
                own = expression(
                    shared | {"x": x, "y": y, "z": z} | particle, functions, like=positions
                ).expand(shape)
                result = own if step.name else own.sum(dim=-1)
            elif not compiled.serve(positions, n_particles=size):
                result = plain(positions, box, particle, shared, None, functions, lists=lists)
            elif step.name:
                result = compiled.sums(positions, box, particle, shared, entries, plain)
            else:
                result = compiled.energy(positions, box, particle, shared, None, entries, plain)
            if step.name:
                particle[step.name] = result
            else:
                energy = energy + result
        assert energy.shape == (n_frames,)
        return energy

    def _size(self, n_frames: int) -> int:
        """Of a system whose pairs are gone over once, for which compiling is as worth while."""
        return max(2 * self.n_particles, n_frames * self.n_particles**2 // _MANY_PAIRS)

    def _over_pairs(
        self,
        step: Step,
        expression: Expression,
        positions: Tensor,
        box: Tensor | None,
        particle: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        switching: Tensor | None = None,
        functions: Mapping[str, Callable[..., Tensor]] | None = None,
        *,
        lists: dict[Computation, OrderedPairs] | None = None,
    ) -> Tensor:
        """Sums at particle 1 ``(frames, N)``, or the energy ``(frames,)``, by torch operations."""
        lists = {} if lists is None else lists
        if step.computation not in lists:
            lists[step.computation] = self._pairs(positions, box, step.computation)
        pairs = lists[step.computation]

        def evaluate(ordered: OrderedPairs) -> Tensor:
            variables = ordered.variables(particle, expression.variables)
            return expression({**shared, **variables}, functions, like=positions)

        if not step.name:
            return pairs.sum(evaluate(pairs))
        result = positions.new_zeros(())
        for ordered in (pairs, pairs.swapped()):
            result = result + ordered.sum_at_first(evaluate(ordered), self.n_particles)
        return result

    def _pairs(
        self, positions: Tensor, box: Tensor | None, computation: Computation
    ) -> OrderedPairs:
        skipped = self.excluded if computation is Computation.PARTICLE_PAIR else self.not_excluded
        pairs = list_pairs(positions, box, skipped, method=self.method, cutoff=self.cutoff)
        return measure(pairs, positions, box, method=self.method, cutoff=self.cutoff)
