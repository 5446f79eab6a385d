"""Expressions of pairs as formulas for the compiled loop over pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.fused.clusters import Exclusions
from mdgraft.kernels.fused.graph import Graph, Node
from mdgraft.kernels.fused.lepton import Description, Distance, translate
from mdgraft.kernels.fused.pair_formulas import PairFormula
from mdgraft.kernels.fused.thinning import Kinds
from mdgraft.kernels.kernel import Kernel
from mdgraft.potentials.nonbonded_formula import switch

#: Numbers that formulas need: the cutoff, and up to which square a distance is zero.
CONSTANTS = ("cutoff", "tiny")


@functools.lru_cache(maxsize=256)
def expression_formula(
    description: Description,
    *,
    n_particle: int,
    n_shared: int,
    ordered: str,
    switched: bool,
    sizes: tuple[int, ...] = (),
    n_kinds: int = 0,
    framed: tuple[int, ...] = (),
    gathered: bool = False,
) -> PairFormula:
    """The energy of a pair; equal expressions share one formula, and so compiled code.

    Parameters
    ----------
    description
        Its variables are ``r``, ``<k>_1`` and ``<k>_2`` for particle quantity k, and ``shared<k>``.
    n_particle, n_shared
        How many quantities the expression has.
    ordered
        Which particle is called 1: that of ``"lower"`` or of ``"higher"`` rank, another particle
        quantity; or ``""`` if it does not matter. With kinds it is both, one after the other.
    switched
        Whether there is a switching distance, another shared quantity.
    sizes
        Of the tables that it looks entries up in.
    n_kinds
        How many kinds of particles there are, another particle quantity; 0 without any. A table
        ``(kinds, kinds)``, after those of functions, then says how often a pair counts. If order
        matters there are two, for the particles of lower and higher rank in this order, which is
        that of the expression, and the other way round.
    framed
        Which particle quantities differ between frames.
    gathered
        Whether each particle sums what it is particle 1 of, see `mdgraft.kernels.sums`; its weight
        is the first particle quantity then, before those of the expression.
    """
    tables = tuple((f"table{k}", size) for k, size in enumerate(sizes))
    counts = ("forward", "backward")[: 1 + bool(ordered)] if n_kinds else ()
    tables += tuple((name, n_kinds**2) for name in counts)
    particle = tuple(f"quantity{k}" for k in range(n_particle))
    particle += ("kind",) * bool(n_kinds) + ("rank",) * bool(ordered)
    shared = tuple(f"shared{k}" for k in range(n_shared + switched))

    def by_rank(
        graph: Graph, first: Mapping[str, Node], second: Mapping[str, Node]
    ) -> list[Mapping[str, Node]]:
        lower = first["rank"] < second["rank"]
        return [
            {name: graph.select(lower, a[name], b[name]) for name in particle}
            for a, b in ((first, second), (second, first))
        ]

    def share(
        graph: Graph,
        u: Node,
        first: Mapping[str, Node],
        second: Mapping[str, Node],
        common: Mapping[str, Node],
    ) -> Node:
        values = {name: common[name] for name in shared}
        for k in range(n_particle):
            values |= {f"{k}_1": first[f"quantity{k}"], f"{k}_2": second[f"quantity{k}"]}
        distance = Distance(u, common["tiny"], rooted=switched)
        result = translate(description, graph, values, distance)
        if distance.rooted:
            # All powers come from one root.
            distance = Distance(u, common["tiny"], rooted=True)
            result = translate(description, graph, values, distance)
        if switched:
            r = distance.times(graph.constant(1.0), 1)
            result = result * switch(r, common[shared[-1]], common["cutoff"])
        return result

    def counted(
        graph: Graph,
        u: Node,
        first: Mapping[str, Node],
        second: Mapping[str, Node],
        common: Mapping[str, Node],
    ) -> Node:
        pair = by_rank(graph, first, second) if ordered else [first, second]
        if not n_kinds:
            one, two = reversed(pair) if ordered == "higher" else pair
            return share(graph, u, one, two, common)
        total = graph.constant(0.0)
        for table, (one, two) in zip(counts, (pair, pair[::-1]), strict=False):
            weight = graph.lookup(table, float(n_kinds) * one["kind"] + two["kind"])
            energy = weight * share(graph, u, one, two, common)
            # What does not interact may be anywhere.
            total = total + graph.select(graph.apply("equal", weight, 0.0), 0.0, energy)
        return total

    def weighted(
        graph: Graph,
        u: Node,
        first: Mapping[str, Node],
        second: Mapping[str, Node],
        common: Mapping[str, Node],
    ) -> Node:
        return first["weight"] * share(graph, u, first, second, common) + second["weight"] * share(
            graph, u, second, first, common
        )

    return PairFormula(
        particle=("weight", *particle) if gathered else particle,
        framed=("weight",) * gathered + tuple(f"quantity{k}" for k in framed),
        shared=shared,
        constants=CONSTANTS,
        tables=tables,
        energy=weighted if gathered else counted,
    )


def expression_kernel(
    description: Description,
    *,
    n_particle: int,
    n_shared: int,
    ordered: str,
    switched: bool,
    sizes: tuple[int, ...],
    kinds: Kinds | None,
    framed: tuple[int, ...],
    gathered: bool,
    cutoff: float,
    exclusions: np.ndarray,
    n_particles: int,
    dtype: torch.dtype,
    make: Callable[..., Kernel],
    reference: Callable[..., Tensor],
) -> Kernel:
    """The compiled loop over pairs of an expression.

    Parameters
    ----------
    description, n_particle, n_shared, ordered, switched, sizes, framed, gathered
        See `expression_formula`.
    kinds
        Kinds of particles that do not all interact, or None.
    cutoff
        [nm]; infinite in an open system without one.
    exclusions
        ``(exclusions, 2)`` particle indices.
    n_particles
        Number of particles.
    dtype
        Precision.
    make
        From `mdgraft.kernels.routes.pair_kernel`.
    reference
        A plain torch form of the same energy.
    """
    formula = expression_formula(
        description,
        n_particle=n_particle,
        n_shared=n_shared,
        ordered=ordered,
        switched=switched,
        sizes=sizes,
        n_kinds=0 if kinds is None else len(kinds.interact),
        framed=framed,
        gathered=gathered,
    )
    # As `geometry.safe_norm` has it.
    tiny = torch.finfo(dtype).tiny ** (2 / 3)
    some = {} if kinds is None else {"kinds": kinds}
    return make(
        formula,
        cutoff=cutoff,
        exclusions=Exclusions.of_pairs(exclusions, n_particles),
        constants=dict(zip(CONSTANTS, (cutoff, tiny), strict=True)),
        reference=reference,
        **some,
    )
