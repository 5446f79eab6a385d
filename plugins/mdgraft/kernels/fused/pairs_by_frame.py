"""All pairs of a small system as a list of items, for many frames at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mdgraft.kernels.fused.geometry import dot
from mdgraft.kernels.fused.graph import Graph, Node, Series
from mdgraft.kernels.fused.pair_formulas import PairFormula
from mdgraft.kernels.fused.tuple_kernel import TupleKernel
from mdgraft.kernels.fused.tuples import TupleFormula, Vector

#: More particles than this are better off with a list of those within the cutoff.
LARGEST = 128
#: Fewer frames than this do not fill a vector.
FEWEST = 4


@functools.lru_cache(maxsize=256)
def _as_items(formula: PairFormula, cutoff: bool) -> TupleFormula:
    def energy(graph: Graph, edges: Sequence[Vector], of: Mapping[str, Any]) -> Node:
        u = dot(edges[0], edges[0])
        first = {name: of[name][0] for name in formula.particle}
        second = {name: of[name][1] for name in formula.particle}
        if not cutoff:
            return formula.energy(graph, u, first, second, of)
        # Asked like this, a lost particle is not outside, and its energy is not a number.
        outside = u >= of["cutoff_squared"]
        pair = formula.energy(graph, graph.select(outside, 1.0, u), first, second, of)
        return graph.select(outside, 0.0, pair)

    return TupleFormula(
        n_particles=2,
        edges=((0, 1),),
        item=(),
        particle=formula.particle,
        framed=formula.framed,
        shared=formula.shared,
        constants=("cutoff_squared", *formula.constants),
        energy=energy,
    )


def pairs_by_frame(
    formula: PairFormula,
    *,
    n_particles: int,
    excluded: set[tuple[int, int]],
    cutoff: float,
    constants: Mapping[str, float],
    table: Callable[[Series], np.ndarray] | None,
    periodic: bool,
    reference: Callable[..., Tensor] | None,
) -> TupleKernel:
    """A kernel of all pairs but the excluded ones, with the inputs of a `PairKernel`."""
    pairs = [
        (i, j)
        for i in range(n_particles)
        for j in range(i + 1, n_particles)
        if (i, j) not in excluded
    ]
    return TupleKernel(
        _as_items(formula, np.isfinite(cutoff)),
        np.array(pairs, dtype=np.int32).reshape(-1, 2),
        constants={"cutoff_squared": cutoff**2, **constants},
        table=table,
        periodic=periodic,
        reference=reference,
    )
