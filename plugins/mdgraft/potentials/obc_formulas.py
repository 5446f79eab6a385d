"""Generalized Born pairs as formulas for compiled loops; see `mdgraft.potentials.obc`."""

from __future__ import annotations

from collections.abc import Mapping

from mdgraft.kernels.fused.graph import Graph, Node
from mdgraft.kernels.fused.pair_formulas import PairFormula


def _distance(graph: Graph, u: Node) -> Node:
    zero = u <= graph.apply("pow", graph.limit("tiny"), 2 / 3)
    return graph.select(zero, 0.0, graph.sqrt(graph.select(zero, 1.0, u)))


def _integral(r: Node, own: Node, other: Node) -> Node:
    """What a sphere of radius ``other`` at distance r takes from the Coulomb field of ``own``."""
    graph = r.graph
    inside = own >= r + other
    upper = graph.select(inside, 1.0, r + other)
    lower = graph.select(inside, 1.0, graph.larger(own, graph.apply("abs", r - other)))
    low, high = 1 / lower, 1 / upper
    inverse = 1 / graph.select(graph.apply("equal", r, 0.0), 1.0, r)
    term = low - high + 0.25 * r * (high * high - low * low)
    term = term + 0.5 * inverse * graph.apply("log", lower / upper)
    term = term + 0.25 * other * other * inverse * (low * low - high * high)
    term = term + graph.select(own < other - r, 2 * (1 / own - low), 0.0)
    return graph.select(inside, 0.0, term)


def _descreening(
    graph: Graph,
    u: Node,
    first: Mapping[str, Node],
    second: Mapping[str, Node],
    common: Mapping[str, Node],
) -> Node:
    r = _distance(graph, u)
    return first["weight"] * _integral(r, first["offset"], second["scaled"]) + second[
        "weight"
    ] * _integral(r, second["offset"], first["scaled"])


def _solvation(
    graph: Graph,
    u: Node,
    first: Mapping[str, Node],
    second: Mapping[str, Node],
    common: Mapping[str, Node],
) -> Node:
    """``q_i q_j (1/f - 1/cutoff)`` with Still's f."""
    product = first["born"] * second["born"]
    screened = graph.rsqrt(u + product * graph.apply("exp", -u / (4 * product)))
    return first["charge"] * second["charge"] * (screened - common["shift"])


DESCREENING = PairFormula(
    particle=("weight", "offset", "scaled"),
    framed=("weight",),
    shared=(),
    constants=(),
    energy=_descreening,
)
SOLVATION = PairFormula(
    particle=("charge", "born"),
    framed=("born",),
    shared=(),
    constants=("shift",),
    energy=_solvation,
)
