"""Connected clusters of constraints in batches of equal size.

Everything happens in the space of constrained pairs. A multiplier ``kappa_b`` moves the particles
of pair b along ``y_b = kappa_b r_b`` by their inverse masses, which changes the vector of pair a by
``C_ab y_b``. The coupling matrix C holds inverse masses of shared particles and is symmetric, so
that SHAKE, RATTLE and the metric tensor are

    r'_a = r*_a + sum_b C_ab kappa_b r_b,    J_ab = 2 C_ab r'_a . r_b,    Z_ab = C_ab u_a . u_b

with unit vectors u. Tensors are ``(frames, clusters, constraints, ...)``.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from mdgraft._errors import ConstraintError
from mdgraft.constraints import _sparse
from mdgraft.kernels.observe import observe

#: Clusters with more constraints than this are solved by sparse factorisation.
DENSE_LIMIT = 64
#: Sizes to which medium clusters are filled up, so that few batches hold them all.
_PADDED = (16, 24, 32, 48, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Clusters with dense matrices.

    Attributes
    ----------
    coupling
        C, ``(1, K, m, m)`` [1/Da].
    units
        Unit vectors ``(F, K, m, 3)`` of constraints.
    metric
        Z, ``(F, K, m, m)`` [1/Da]; rows that are filled up are those of the identity.
    rows
        Which of the rows of the batch these are.
    """

    coupling: Tensor
    units: Tensor
    metric: Tensor
    rows: slice


def dot(a: Tensor, b: Tensor) -> Tensor:
    """``a . b`` over the last axis, which is so short that a matrix product is quickest."""
    return (a * b) @ a.new_ones(3)


class AbstractClusters(nn.Module, abc.ABC):
    """A batch of clusters and the linear algebra of their coupling matrices.

    Attributes
    ----------
    first, second
        ``(K, m)`` particles of each constraint; the same twice where a row is filled up.
    slots
        ``(K, m)`` which constraint of the set each one is; 0 where a row is filled up.
    present
        ``(K, m)`` one for constraints, zero for what fills rows up; None if all are constraints.
    """

    first: Tensor
    second: Tensor
    slots: Tensor
    present: Tensor | None

    def __init__(self, pairs: np.ndarray, slots: np.ndarray) -> None:
        super().__init__()
        filled = slots < 0
        slots = np.where(filled, 0, slots)
        both = np.where(filled[..., None], pairs[slots][..., :1], pairs[slots])
        self.register_buffer("first", torch.from_numpy(both[..., 0].copy()))
        self.register_buffer("second", torch.from_numpy(both[..., 1].copy()))
        self.register_buffer("slots", torch.from_numpy(slots))
        present = torch.from_numpy(1.0 - filled) if filled.any() else None
        self.register_buffer("present", present)

    @abc.abstractmethod
    def coupling(self, first: Tensor, second: Tensor) -> Tensor:
        """Entries of C ``(1, K, ...)`` from inverse masses ``(K, m)`` of a pair's particles."""

    @abc.abstractmethod
    def image(self, coupling: Tensor, vectors: Tensor) -> Tensor:
        """``sum_b C_ab y_b`` of vectors ``(F, K, m, 3)``."""

    @abc.abstractmethod
    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """``left_a . right_b`` at the entries of C."""

    @abc.abstractmethod
    def matrix(self, entries: Tensor) -> Tensor:
        """Entries of a regular matrix: rows that are filled up become those of the identity."""

    @abc.abstractmethod
    def solve(self, matrix: Tensor, target: Tensor, *, transposed: bool = False) -> Tensor:
        """Solution ``(F, K, m)``, differentiable to every order."""

    @abc.abstractmethod
    def solve_plain(self, matrix: Tensor, target: Tensor) -> Tensor:
        """As `solve`, for plain tensors; not finite where the matrix is singular."""

    @abc.abstractmethod
    def smallest_pivots(self, matrix: Tensor) -> Tensor:
        """Pivots ``(F, K)``, relative to the diagonal, that tell how singular a matrix is."""

    @abc.abstractmethod
    def blocks(self, coupling: Tensor, units: Tensor) -> Iterator[Block]:
        """Dense blocks; all those of a batch of small clusters at once."""

    def check_regular(self, matrix: Tensor) -> None:
        """Raise `ConstraintError` where constraints depend on each other."""

        def check(plain: Tensor) -> Tensor:
            pivots = self.smallest_pivots(plain)
            # A pivot is the square of the sine of an angle between gradients.
            threshold = torch.finfo(plain.dtype).eps ** 0.5
            bad = ~(pivots > threshold)
            if bool(bad.any()):
                frame, cluster = bad.nonzero()[0].tolist()
                raise ConstraintError(
                    f"positions: constraints {self.described(cluster)} depend on each other in "
                    f"frame {frame} (relative pivot {float(pivots[frame, cluster]):.1e}), so that "
                    "multipliers and derivatives are not defined; drop those that follow from the "
                    "others, and constrain collinear triples by two distances and a virtual site"
                )
            return plain.new_empty(0)

        observe(check, lambda result, _: result, matrix)

    def described(self, cluster: int) -> str:
        """Some pairs of a cluster, in words."""
        rows = torch.stack([self.first[cluster], self.second[cluster]], dim=-1).tolist()
        pairs = [f"{i}-{j}" for i, j in rows if i != j]
        return ", ".join(pairs[:6]) + (f", ... ({len(pairs)})" if len(pairs) > 6 else "")


class DenseClusters(AbstractClusters):
    """Small clusters: batches of dense matrices ``(F, K, m, m)``."""

    _first_signs: Tensor
    _second_signs: Tensor
    _filled: Tensor | None

    def __init__(self, pairs: np.ndarray, slots: np.ndarray) -> None:
        super().__init__(pairs, slots)
        i, j = self.first, self.second
        present = torch.ones_like(i, dtype=torch.float64) if self.present is None else self.present

        def same(a: Tensor, b: Tensor) -> Tensor:
            return (a[..., :, None] == b[..., None, :]) * (
                present[..., :, None] * present[..., None, :]
            )

        self.register_buffer("_first_signs", same(i, i) - same(i, j))
        self.register_buffer("_second_signs", same(j, j) - same(j, i))
        filled = None if self.present is None else torch.diag_embed(1.0 - self.present)
        self.register_buffer("_filled", filled)

    def coupling(self, first: Tensor, second: Tensor) -> Tensor:
        own = self._first_signs * first.unsqueeze(-1) + self._second_signs * second.unsqueeze(-1)
        return own.unsqueeze(0)

    def image(self, coupling: Tensor, vectors: Tensor) -> Tensor:
        return coupling @ vectors

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right.mT

    def matrix(self, entries: Tensor) -> Tensor:
        return entries if self._filled is None else entries + self._filled

    def solve(self, matrix: Tensor, target: Tensor, *, transposed: bool = False) -> Tensor:
        matrix = matrix.mT if transposed else matrix
        solution: Tensor = torch.linalg.solve(matrix, target.unsqueeze(-1)).squeeze(-1)
        return solution

    def solve_plain(self, matrix: Tensor, target: Tensor) -> Tensor:
        found: Any = torch.linalg.solve_ex(matrix, target.unsqueeze(-1))
        solution: Tensor = found.result.squeeze(-1)
        return torch.where(found.info.unsqueeze(-1) == 0, solution, torch.nan)

    def smallest_pivots(self, matrix: Tensor) -> Tensor:
        scale = matrix.diagonal(dim1=-2, dim2=-1).abs().sqrt()
        scaled = matrix / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
        factors: Tensor = torch.linalg.lu_factor_ex(scaled.nan_to_num(0.0, 0.0, 0.0))[0]
        return factors.diagonal(dim1=-2, dim2=-1).abs().amin(dim=-1)

    def blocks(self, coupling: Tensor, units: Tensor) -> Iterator[Block]:
        metric = self.matrix(coupling * self.products(units, units))
        yield Block(
            coupling=coupling, units=units, metric=metric, rows=slice(0, self.first.numel())
        )


class SparseClusters(AbstractClusters):
    """Large clusters side by side: one sparse matrix with entries ``(F, 1, E)``."""

    _rows: Tensor
    _columns: Tensor
    _first_signs: Tensor
    _second_signs: Tensor

    def __init__(self, pairs: np.ndarray, clusters: list[np.ndarray]) -> None:
        slots = np.concatenate(clusters)[None]
        super().__init__(pairs, slots)
        i, j = pairs[slots[0]].T
        m, n = len(i), int(pairs.max()) + 1
        signs = {}
        for name, ends, other in (("first", i, j), ("second", j, i)):
            # Which constraints end in a particle, counted with the sign of the end.
            of = [coo_array((np.ones(m), (np.arange(m), e)), shape=(m, n)) for e in (ends, other)]
            signs[name] = (of[0] @ (of[0] - of[1]).T).tocsr()
        pattern = (abs(signs["first"]) + abs(signs["second"])).tocoo()
        self.register_buffer("_rows", torch.from_numpy(pattern.coords[0].astype(np.int64)))
        self.register_buffer("_columns", torch.from_numpy(pattern.coords[1].astype(np.int64)))
        for name, matrix in signs.items():
            at = np.asarray(matrix[pattern.coords[0], pattern.coords[1]]).reshape(-1)
            self.register_buffer(f"_{name}_signs", torch.from_numpy(at))
        ends = np.cumsum([len(c) for c in clusters])
        self._bounds = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))

    def coupling(self, first: Tensor, second: Tensor) -> Tensor:
        own = self._first_signs * first[:, self._rows] + self._second_signs * second[:, self._rows]
        return own.unsqueeze(0)

    def image(self, coupling: Tensor, vectors: Tensor) -> Tensor:
        terms = coupling.unsqueeze(-1) * vectors[..., self._columns, :]
        return torch.zeros_like(vectors).index_add(-2, self._rows, terms)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        return dot(left[..., self._rows, :], right[..., self._columns, :])

    def matrix(self, entries: Tensor) -> Tensor:
        return entries

    def solve(self, matrix: Tensor, target: Tensor, *, transposed: bool = False) -> Tensor:
        rows, columns = self._rows, self._columns
        if transposed:
            rows, columns = columns, rows
        return _sparse.solve(rows, columns, matrix, target)

    def solve_plain(self, matrix: Tensor, target: Tensor) -> Tensor:
        return _sparse.solve(self._rows, self._columns, matrix, target)

    def smallest_pivots(self, matrix: Tensor) -> Tensor:
        return _sparse.smallest_pivots(self._rows, self._columns, matrix, self.first.shape[1])

    def blocks(self, coupling: Tensor, units: Tensor) -> Iterator[Block]:
        for start, stop in self._bounds:
            inside = ((self._rows >= start) & (self._rows < stop)).nonzero().squeeze(-1)
            m = stop - start
            flat = (self._rows[inside] - start) * m + self._columns[inside] - start
            entries = coupling[..., inside]
            dense = entries.new_zeros(*entries.shape[:-1], m * m).index_copy(-1, flat, entries)
            dense = dense.reshape(*entries.shape[:-1], m, m)
            own = units[..., start:stop, :]
            yield Block(
                coupling=dense, units=own, metric=dense * (own @ own.mT), rows=slice(start, stop)
            )


def batches_of(pairs: np.ndarray, n_particles: int) -> list[AbstractClusters]:
    """Sort constraints ``(C, 2)`` into batches of connected clusters.

    Clusters of equal size form a batch. Those of medium size are filled up to a few sizes; large
    ones form one sparse system.
    """
    if not len(pairs):
        return []
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(n_particles, n_particles))
    labels = connected_components(graph, directed=False)[1][pairs[:, 0]]
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    by_size: dict[int, list[np.ndarray]] = {}
    large: list[np.ndarray] = []
    for cluster in np.split(order, starts):
        m = len(cluster)
        if m > DENSE_LIMIT:
            large.append(cluster)
            continue
        size = m if m < _PADDED[0] else next(s for s in _PADDED if s >= m)
        by_size.setdefault(size, []).append(cluster)
    batches: list[AbstractClusters] = []
    for size in sorted(by_size):
        slots = np.full((len(by_size[size]), size), -1)
        for row, cluster in zip(slots, by_size[size], strict=True):
            row[: len(cluster)] = cluster
        batches.append(DenseClusters(pairs, slots))
    if large:
        batches.append(SparseClusters(pairs, large))
    return batches
