"""Interactions of sets of several particles, with an expression of their coordinates."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.observe import observe
from mdgraft.kernels.pairs import close_pairs
from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm, Tables
from mdgraft.potentials.custom.points import GEOMETRY, POINT_FUNCTIONS
from mdgraft.potentials.custom.tuples import Tuples, by_frame, in_every_frame

# Candidates that are looked at together while sets are listed.
_CHUNK = 5_000_000


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
        Types that each place in a set admits; empty for all. Pairs with a central particle are
        not filtered, as in OpenMM.
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

    def list(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Sets ``(n, size)`` in the order in which the expression numbers their particles.

        ``first``, ``second`` ``(pairs,)`` are the pairs within the cutoff, each once.
        """
        n, excluded = len(self.types), self._keys(*self.exclusions.reshape(-1, 2).T)
        low, high = np.minimum(first, second), np.maximum(first, second)
        allowed = ~_among(low * n + high, excluded)
        low, high = low[allowed], high[allowed]
        if self.central:
            low, high = np.concatenate([low, high]), np.concatenate([high, low])
        edges = np.sort(low * n + high)
        start = np.searchsorted(edges, np.arange(n + 1) * n)
        sets = np.stack([edges // n, edges % n], axis=1)
        if self.size == 1:
            sets = np.arange(n)[:, None]
        for place in range(2, self.size):
            # The next particle is a neighbour of the centre, or of the last one, which is lower.
            anchor = sets[:, 0 if self.central else -1]
            count = start[anchor + 1] - start[anchor]
            found = [np.empty((0, place + 1), dtype=np.int64)]
            for rows in _portions(count):
                row = np.repeat(rows, count[rows])
                within = np.arange(len(row)) - np.repeat(
                    np.cumsum(count[rows]) - count[rows], count[rows]
                )
                part, last = sets[row], edges[start[anchor[row]] + within] % n
                if self.central:
                    keep = last > part[:, -1]
                    for other in part[:, 1:].T:
                        keep &= ~_among(self._keys(other, last, ordered=False), excluded)
                else:
                    keep = np.ones(len(row), dtype=bool)
                    for other in part[:, :-1].T:
                        keep &= _among(other * n + last, edges)
                found.append(np.concatenate([part[keep], last[keep, None]], axis=1))
            sets = np.concatenate(found)
        return self._ordered(sets)

    def _keys(self, one: np.ndarray, two: np.ndarray, *, ordered: bool = True) -> np.ndarray:
        """A number for each pair, whichever particle comes first; sorted on request."""
        keys = np.minimum(one, two) * len(self.types) + np.maximum(one, two)
        return np.sort(keys) if ordered else keys

    def _ordered(self, sets: np.ndarray) -> np.ndarray:
        """Sets that pass the filters, permuted by the first permutation that lets them pass."""
        kinds = np.unique(self.types)
        admits = [np.array([not f or kind in f for kind in kinds]) for f in self.filters]
        orders = _permutations(list(range(self.size)), 1 if self.central else 0)
        # OpenMM does not look at filters where there is nothing to permute.
        if all(a.all() for a in admits) or len(orders) == 1:
            return sets
        types = np.searchsorted(kinds, self.types)[sets]
        result, waiting = np.empty_like(sets), np.ones(len(sets), dtype=bool)
        for order in orders:
            passes = waiting.copy()
            for place, source in enumerate(order):
                passes &= admits[place][types[:, source]]
            result[passes] = sets[passes][:, order]
            waiting &= ~passes
        return result[~waiting]


def _among(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which keys are among the sorted ``known`` ones."""
    if not len(known):
        return np.zeros(len(keys), dtype=bool)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    result: np.ndarray = known[place] == keys
    return result


def _portions(count: np.ndarray) -> Iterator[np.ndarray]:
    """Ranges of rows of which each has so many entries, about `_CHUNK` of them at a time."""
    total = np.cumsum(count)
    portion = total // _CHUNK
    edges = [0, *(np.flatnonzero(np.diff(portion)) + 1).tolist(), len(count)]
    for low, high in itertools.pairwise(edges):
        yield np.arange(low, high)


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
            sets = rules.list(*np.triu_indices(n, 1))
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
        within = torch.ones_like(tuples.frame, dtype=torch.bool)
        if math.isfinite(self.rules.cutoff):
            for i, j in itertools.combinations(range(self.rules.size), 2):
                if i == 0 or not self.rules.central:
                    within = within & (tuples.distance(i, j) < self.rules.cutoff)
            tuples = tuples.only(within, self.rules.cutoff)
        variables = tuples.variables(self.energy, self.labels)
        variables |= self.shared_values(global_values)
        for name, value in self.item_values(values).items():
            for place in range(self.rules.size):
                if f"{name}{place + 1}" in self.energy.variables:
                    variables[f"{name}{place + 1}"] = value[tuples.particles[:, place]]
        functions = tuples.point_functions() | self.functions(values)
        energies = self.energy(variables, functions, like=positions)
        energies = energies.expand(tuples.particles.shape[0])
        energies = torch.where(within, energies, 0.0)
        nothing = (value.flatten()[:0].sum() for value in values.values())
        unused = sum(nothing, positions.new_zeros(()))
        return tuples.sum(energies) + unused + 0.0 * positions.sum(dim=(-2, -1))

    def _sets(self, positions: Tensor, box: Tensor | None) -> Tuples:
        rules = self.rules
        if math.isinf(rules.cutoff):
            return in_every_frame(self.every, positions, box)

        def build(*frames: Tensor) -> Tensor:
            rows = [torch.empty(0, rules.size + 1, dtype=torch.long)]
            for f in range(frames[0].shape[0]):
                cell = frames[1][f].cpu().double().numpy() if box is not None else None
                pairs = close_pairs(frames[0][f].cpu().double().numpy(), cell, rules.cutoff)
                sets = torch.from_numpy(rules.list(*pairs))
                rows.append(torch.cat([torch.full_like(sets[:, :1], f), sets], dim=1))
            return torch.cat(rows).to(frames[0].device)

        def union(rows: Tensor, n_frames: int) -> Tensor:
            folded = torch.cat([rows[:, :1] % n_frames, rows[:, 1:]], dim=1)
            result: Tensor = torch.unique(folded, dim=0)
            return result

        observed = (positions,) if box is None else (positions, box)
        rows = observe(build, union, *observed)
        return by_frame(rows[:, 0], rows[:, 1:], positions, box)
