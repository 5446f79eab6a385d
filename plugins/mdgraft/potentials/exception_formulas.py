"""Exceptions of a nonbonded term as formulas for compiled loops.

See `mdgraft.potentials.nonbonded_exceptions` for the same in plain torch, and
`mdgraft.kernels.special` for the two screening functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mdgraft._units import COULOMB
from mdgraft.kernels.fused.geometry import dot
from mdgraft.kernels.fused.graph import Graph, Node
from mdgraft.kernels.fused.tuples import TupleFormula, Vector


def _interaction(graph: Graph, edges: Sequence[Vector], of: Mapping[str, Any]) -> Node:
    u = dot(edges[0], edges[0])
    qq, sigma, epsilon = of["charge_product"], of["sigma"], of["epsilon"]
    # Excluded pairs add nothing at any distance; others are never within a negative distance.
    no_charge = graph.apply("equal", qq, 0.0)
    no_depth = graph.apply("equal", epsilon, 0.0)
    within = graph.select(no_charge, graph.select(no_depth, u, math.inf), math.inf)
    coincident = within <= 0
    overflow = within <= 1e-6 * sigma * sigma
    coulomb = COULOMB * qq * graph.rsqrt(graph.select(coincident, 1.0, u))
    x = (sigma * sigma / graph.select(overflow, 1.0, u)) ** 3
    lennard_jones = 4 * epsilon * x * (x - 1)
    return graph.select(coincident, 0.0, coulomb) + graph.select(overflow, 0.0, lennard_jones)


def _polynomial(x: Node, coefficients: Sequence[float]) -> Node:
    """Horner's rule, lowest power first."""
    result = x.graph.constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def _erf_over_root(v: Node) -> Node:
    """``erf(sqrt(v)) / sqrt(v)``, analytic at zero."""
    graph = v.graph
    small = v < 0.1
    near = graph.select(small, v, 0.0)
    terms = [(-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(12)]
    root = graph.sqrt(graph.select(small, 1.0, v))
    series = 2 / math.sqrt(math.pi) * _polynomial(near, terms)
    return graph.select(small, series, graph.apply("erf", root) / root)


def dispersion_damping(x: Node) -> Node:
    """``[1 - exp(-x)(1 + x + x^2/2)] / x^3``, analytic at zero."""
    graph = x.graph
    small = x < 1.0
    near = graph.select(small, x, 0.0)
    far = graph.select(small, 1.0, x)
    series = _polynomial(near, [1 / math.factorial(k + 3) for k in range(18)])
    closed = (1 - graph.apply("exp", -far) * (1 + far + 0.5 * far * far)) / far**3
    return graph.select(small, graph.apply("exp", -near) * series, closed)


def _excluded(graph: Graph, edges: Sequence[Vector], of: Mapping[str, Any]) -> Node:
    u = dot(edges[0], edges[0])
    alpha: Node = of["alpha"]
    first, second = of["charge"]
    energy: Node = COULOMB * (first * second) * (alpha * _erf_over_root(alpha * alpha * u))
    if "c6" in of:
        beta2: Node = of["dispersion_alpha"] * of["dispersion_alpha"]
        first, second = of["c6"]
        energy = energy - first * second * beta2**3 * dispersion_damping(beta2 * u)
    return energy


INTERACTION = TupleFormula(
    n_particles=2,
    edges=((0, 1),),
    item=("charge_product", "sigma", "epsilon"),
    energy=_interaction,
)
EXCLUDED = TupleFormula(
    n_particles=2,
    edges=((0, 1),),
    item=(),
    particle=("charge",),
    constants=("alpha",),
    energy=_excluded,
)
EXCLUDED_WITH_DISPERSION = TupleFormula(
    n_particles=2,
    edges=((0, 1),),
    item=(),
    particle=("charge", "c6"),
    constants=("alpha", "dispersion_alpha"),
    energy=_excluded,
)
