"""Interactions of sets of several particles, with an expression of their coordinates."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import BoxTooSmallError
from mdgraft.kernels.observe import observe
from mdgraft.kernels.periodic import minimum_image
from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm, Tables
from mdgraft.potentials.custom.points import GEOMETRY, POINT_FUNCTIONS
from mdgraft.potentials.custom.tuples import Tuples, by_frame, in_every_frame

# Entries of the largest temporary array while sets are listed.
_CHUNK = 20_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetRules:
    """Which sets of particles interact.

    Attributes
    ----------
    size
        Number of particles in a set.
    central
        Whether the first particle of a set is special, so that every choice of it counts and the
        cutoff applies to its distances only; otherwise each set counts once and the cutoff applies
        to all distances.
    types
        ``(N,)`` type of each particle.
    filters
        Types that each place in a set admits; empty for all.
    exclusions
        ``(exclusions, 2)`` pairs that must not occur in a set.
    cutoff
        [nm]; infinite for all sets.
    """

    size: int
    central: bool
    types: np.ndarray
    filters: tuple[frozenset[int], ...]
    exclusions: np.ndarray
    cutoff: float = math.inf

    def list(self, close: np.ndarray) -> np.ndarray:
        """Sets ``(n, size)`` in the order in which the expression numbers their particles.

        ``close`` ``(N, N)`` says which pairs are within the cutoff.
        """
        n = len(close)
        allowed = np.ones((n, n), dtype=bool)
        np.fill_diagonal(allowed, False)
        if len(self.exclusions):
            first, second = self.exclusions.T
            allowed[first, second] = allowed[second, first] = False
        sets = np.arange(n)[:, None]
        for place in range(1, self.size):
            found = [np.empty((0, place + 1), dtype=np.int64)]
            for start in range(0, len(sets), max(1, _CHUNK // (n * place))):
                part = sets[start : start + max(1, _CHUNK // (n * place))]
                mask = allowed[part].all(axis=1)
                mask &= close[part[:, 0]] if self.central else close[part].all(axis=1)
                if place > 1 or not self.central:
                    mask &= np.arange(n) > part[:, -1:]
                row, last = np.nonzero(mask)
                found.append(np.concatenate([part[row], last[:, None]], axis=1))
            sets = np.concatenate(found)
        return self._ordered(sets)

    def _ordered(self, sets: np.ndarray) -> np.ndarray:
        """Sets that pass the filters, permuted by the first permutation that lets them pass."""
        kinds = np.unique(self.types)
        admits = [np.array([not f or kind in f for kind in kinds]) for f in self.filters]
        if all(a.all() for a in admits):
            return sets
        types = np.searchsorted(kinds, self.types)[sets]
        result, waiting = np.empty_like(sets), np.ones(len(sets), dtype=bool)
        for order in _permutations(list(range(self.size)), 1 if self.central else 0):
            passes = waiting.copy()
            for place, source in enumerate(order):
                passes &= admits[place][types[:, source]]
            result[passes] = sets[passes][:, order]
            waiting &= ~passes
        return result[~waiting]


def _permutations(values: list[int], fixed: int) -> list[list[int]]:
    """In the order in which OpenMM tries them: by exchanging one place after the other."""
    if fixed == len(values):
        return [list(values)]
    found = []
    for i in range(fixed, len(values)):
        swapped = list(values)
        swapped[fixed], swapped[i] = swapped[i], swapped[fixed]
        found += _permutations(swapped, fixed + 1)
    return found


class CustomManyParticle(AbstractCustomTerm):
    """A sum over sets of particles of an expression of their coordinates.

    Parameters
    ----------
    energy
        Expression [kJ/mol] of ``x1``, ``y1``, ...; ``distance``, ``angle`` and ``dihedral`` of
        ``p1``, ``p2``, ...; ``<name>1``, ... of each per-particle parameter; global parameters.
    parameters
        Values ``(N,)`` of each per-particle parameter by name.
    rules
        Which sets interact.
    periodic
        Whether distances are those of nearest periodic images.
    global_names, tables
        See `AbstractCustomTerm`.
    where
        What errors call the expression.

    Raises
    ------
    InvalidInputError
        If the expression is one that OpenMM refuses.
    """

    every: Tensor

    def __init__(
        self,
        energy: str,
        parameters: Mapping[str, Tensor],
        *,
        rules: SetRules,
        periodic: bool = False,
        global_names: Sequence[str] = (),
        tables: Tables | None = None,
        where: str = "energy",
    ) -> None:
        super().__init__(parameters, global_names=global_names, tables=tables, periodic=periodic)
        self.rules = rules
        self.labels = tuple(f"p{i + 1}" for i in range(rules.size))
        n = len(rules.types)
        # Without a cutoff the sets are always the same.
        sets = np.empty((0, rules.size), dtype=np.int64)
        if math.isinf(rules.cutoff):
            sets = rules.list(np.ones((n, n), dtype=bool))
        self.register_buffer("every", torch.from_numpy(sets), persistent=False)
        places = range(1, rules.size + 1)
        self.energy = Expression(
            energy,
            variables=(
                *(f"{axis}{i}" for i in places for axis in "xyz"),
                *(f"{name}{i}" for i in places for name in parameters),
                *global_names,
            ),
            functions=POINT_FUNCTIONS | self.arities,
            geometry=GEOMETRY,
            labels=self.labels,
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
        tuples = self._sets(positions, box)
        variables = tuples.variables(self.energy, self.labels)
        variables |= self.shared_values(global_values)
        for name, value in self.item_values(values).items():
            for place in range(self.rules.size):
                if f"{name}{place + 1}" in self.energy.variables:
                    variables[f"{name}{place + 1}"] = value[tuples.particles[:, place]]
        functions = tuples.point_functions() | self.functions(values)
        energies = self.energy(variables, functions, like=positions)
        energies = energies.expand(tuples.particles.shape[0])
        for i, j in itertools.combinations(range(self.rules.size), 2):
            if math.isfinite(self.rules.cutoff) and (i == 0 or not self.rules.central):
                within = tuples.distance(i, j) < self.rules.cutoff
                energies = torch.where(within, energies, 0.0)
        unused = sum((0.0 * value.sum() for value in values.values()), positions.new_zeros(()))
        return tuples.sum(energies) + unused + 0.0 * positions.sum(dim=(-2, -1))

    def _sets(self, positions: Tensor, box: Tensor | None) -> Tuples:
        rules = self.rules
        if math.isinf(rules.cutoff):
            return in_every_frame(self.every, positions, box)

        def build(*frames: Tensor) -> Tensor:
            rows = [torch.empty(0, rules.size + 1, dtype=torch.long)]
            for f in range(frames[0].shape[0]):
                cell = frames[1][f].cpu().double() if box is not None else None
                sets = torch.from_numpy(rules.list(_close(frames[0][f], cell, rules.cutoff)))
                rows.append(torch.cat([torch.full_like(sets[:, :1], f), sets], dim=1))
            return torch.cat(rows).to(frames[0].device)

        def union(rows: Tensor, n_frames: int) -> Tensor:
            folded = torch.cat([rows[:, :1] % n_frames, rows[:, 1:]], dim=1)
            result: Tensor = torch.unique(folded, dim=0)
            return result

        observed = (positions,) if box is None else (positions, box)
        rows = observe(build, union, *observed)
        return by_frame(rows[:, 0], rows[:, 1:], positions, box)


def _close(positions: Tensor, box: Tensor | None, cutoff: float) -> np.ndarray:
    """Which pairs of particles are closer than the cutoff, ``(N, N)``."""
    x = positions.detach().cpu().double()
    if box is not None and bool((box.diagonal() < 1.999999 * cutoff).any()):
        raise BoxTooSmallError(
            f"box: has the diagonal {box.diagonal().tolist()} nm, but a cutoff of {cutoff:g} nm "
            f"needs at least {2 * cutoff:g} nm in every direction; use a larger box or a shorter "
            "cutoff"
        )
    close = np.zeros((len(x), len(x)), dtype=bool)
    step = max(1, _CHUNK // (3 * max(len(x), 1)))
    for start in range(0, len(x), step):
        vectors = x[None] - x[start : start + step, None]
        if box is not None:
            vectors = minimum_image(vectors, box)
        close[start : start + step] = ((vectors * vectors).sum(dim=-1) < cutoff**2).numpy()
    return close
