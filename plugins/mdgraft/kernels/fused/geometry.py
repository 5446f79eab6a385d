"""Distances, angles and dihedrals as formulas.

The same definitions as in `mdgraft.potentials.geometry`, with the same values and derivatives where
they are degenerate; see there for the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from mdgraft.kernels.fused.graph import Graph, Node

#: Three components.
Vector: TypeAlias = Sequence[Node]


def dot(a: Vector, b: Vector) -> Node:
    """Scalar product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vector, b: Vector) -> list[Node]:
    """Vector product."""
    return [
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    ]


def largest(vector: Vector) -> Node:
    """Largest magnitude of a component, a constant of differentiation."""
    graph = vector[0].graph
    x, y, z = (graph.apply("abs", graph.still(component)) for component in vector)
    return graph.larger(graph.larger(x, y), z)


def norm(vector: Vector) -> Node:
    """Length; where it is zero, so is its derivative."""
    graph = vector[0].graph
    squared = dot(vector, vector)
    zero = squared <= graph.apply("pow", graph.limit("tiny"), 2 / 3)
    return graph.select(zero, 0.0, graph.sqrt(graph.select(zero, 1.0, squared)))


def rescaled(vector: Vector) -> list[Node]:
    """The vector divided by its largest component, a constant of differentiation."""
    graph = vector[0].graph
    size = largest(vector)
    factor = 1 / graph.select(size <= graph.sqrt(graph.limit("tiny")), 1.0, size)
    return [component * factor for component in vector]


def polar_angle(y: Node, x: Node, undefined: float) -> Node:
    """``atan2(y, x)``, or a constant where both are zero."""
    graph = y.graph
    size = graph.larger(graph.apply("abs", graph.still(x)), graph.apply("abs", graph.still(y)))
    zero = size <= graph.sqrt(graph.limit("tiny"))
    factor = 1 / graph.select(zero, 1.0, size)
    angle = graph.apply(
        "atan2", graph.select(zero, 0.0, y) * factor, graph.select(zero, 1.0, x) * factor
    )
    return graph.select(zero, undefined, angle)


def rounding(graph: Graph) -> Node:
    """What a component of a vector product of `rescaled` vectors may be by rounding alone."""
    return 4.0 * graph.limit("eps")


def bend(first: Vector, second: Vector) -> tuple[Node, Node, list[Node], Node]:
    """Angle, whether it is straight (0 or pi), and the arms' vector and scalar product."""
    graph = first[0].graph
    a, b = rescaled(first), rescaled(second)
    product, scalar = cross(a, b), dot(a, b)
    straight = largest(product) <= rounding(graph)
    sine = norm([graph.select(straight, 0.0, component) for component in product])
    return polar_angle(sine, scalar, 0.5 * math.pi), straight, product, scalar


def squared_angle_deviation(first: Vector, second: Vector, reference: Node) -> Node:
    """``(angle - reference)^2`` of two arms, smooth wherever it can be."""
    graph = reference.graph
    theta, straight, product, scalar = bend(first, second)
    # (angle - straight)^2 = tan^2 + O(tan^4), in the components of the vector product.
    nonzero = graph.select(graph.apply("equal", scalar, 0.0), 1.0, scalar)
    inverse = 1 / graph.select(straight, nonzero, 1.0)
    tangent = [component * inverse for component in product]
    limit = graph.select(scalar < 0, math.pi, 0.0)
    smooth = dot(tangent, tangent) + (limit - reference) * (limit - reference)
    return graph.select(straight, smooth, (theta - reference) * (theta - reference))


def dihedral(a: Vector, b: Vector, c: Vector) -> Node:
    """Dihedral angle, zero for cis, of vectors j -> i, j -> k, m -> k."""
    graph = a[0].graph
    a, b, c = rescaled(a), rescaled(b), rescaled(c)
    ab, bc = cross(a, b), cross(b, c)
    undefined = graph.smaller(largest(ab), largest(bc)) <= rounding(graph)
    # phi = atan2(|b| a.(b x c), (a x b).(b x c))
    y = graph.select(undefined, 0.0, norm(b) * dot(a, bc))
    x = graph.select(undefined, 0.0, dot(ab, bc))
    return polar_angle(y, x, 0.5 * math.pi)
