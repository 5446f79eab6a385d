"""Expressions of coordinates, distances, angles and dihedrals as formulas for compiled loops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from mdgraft.kernels.fused import geometry
from mdgraft.kernels.fused.graph import Graph, Node
from mdgraft.kernels.fused.lepton import Description, translate
from mdgraft.kernels.fused.tuples import ORIGIN, TupleFormula, Vector

#: ``x``, ``y``, ``z``, ``distance``, ``angle`` or ``dihedral``, and the places of its particles in
#: an item.
Measure: TypeAlias = tuple[str, tuple[int, ...]]

#: Vectors between particles by place, and what is made of them.
_MEASURES: dict[str, tuple[tuple[tuple[int, int], ...], Callable[..., Node]]] = {
    "x": (((ORIGIN, 0),), lambda place: place[0]),
    "y": (((ORIGIN, 0),), lambda place: place[1]),
    "z": (((ORIGIN, 0),), lambda place: place[2]),
    "distance": (((0, 1),), geometry.norm),
    "angle": (((0, 1), (2, 1)), lambda *arms: geometry.bend(*arms)[0]),
    "dihedral": (((1, 0), (1, 2), (3, 2)), geometry.dihedral),
}


@functools.lru_cache(maxsize=256)
def item_formula(
    description: Description,
    *,
    n_particles: int,
    n_item: int,
    n_shared: int,
    measures: tuple[Measure, ...],
) -> TupleFormula:
    """The energy of an item; equal expressions share one formula, and so compiled code.

    Parameters
    ----------
    description
        Its variables are ``item<k>``, ``shared<k>`` and ``measure<k>``.
    n_particles
        Particles of an item.
    n_item, n_shared
        How many quantities items have, and share.
    measures
        What the expression sees of the particles' positions.
    """
    ends = [
        [(a if a == ORIGIN else of[a], of[b]) for a, b in _MEASURES[kind][0]]
        for kind, of in measures
    ]
    edges = tuple(dict.fromkeys(edge for own in ends for edge in own))
    item = tuple(f"item{k}" for k in range(n_item))
    shared = tuple(f"shared{k}" for k in range(n_shared))

    def energy(graph: Graph, vectors: Sequence[Vector], of: Mapping[str, Any]) -> Node:
        vector = dict(zip(edges, vectors, strict=True))
        values: dict[str, Node] = {name: of[name] for name in (*item, *shared)}
        for k, ((kind, _), own) in enumerate(zip(measures, ends, strict=True)):
            values[f"measure{k}"] = _MEASURES[kind][1](*(vector[edge] for edge in own))
        return translate(description, graph, values)

    return TupleFormula(
        n_particles=n_particles, edges=edges, item=item, shared=shared, energy=energy
    )
