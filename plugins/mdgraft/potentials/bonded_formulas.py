"""Bonds, angles and torsions as formulas for compiled loops.

Edges are named so that a formula sees the vectors it needs; see `mdgraft.potentials.bonded` for the
energies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mdgraft.kernels.fused import geometry
from mdgraft.kernels.fused.graph import Graph, Node
from mdgraft.kernels.fused.tuples import TupleFormula, Vector

_BOND = ((0, 1),)
#: Both arms end at the vertex.
_ANGLE = ((0, 1), (2, 1))
#: j -> i, j -> k, m -> k.
_DIHEDRAL = ((1, 0), (1, 2), (3, 2))


def _harmonic_bond(graph: Graph, edges: Sequence[Vector], of: Mapping[str, Any]) -> Node:
    length: Node = of["length"]
    stretch = geometry.norm(edges[0]) - length
    k: Node = of["k"]
    return 0.5 * k * (stretch * stretch)


def _harmonic_angle(graph: Graph, edges: Sequence[Vector], of: Mapping[str, Any]) -> Node:
    k: Node = of["k"]
    return 0.5 * k * geometry.squared_angle_deviation(edges[0], edges[1], of["angle"])


def _periodic_torsion(graph: Graph, edges: Sequence[Vector], of: Mapping[str, Any]) -> Node:
    phi = geometry.dihedral(*edges)
    wave: Node = graph.apply("cos", of["periodicity"] * phi - of["phase"])
    k: Node = of["k"]
    return k * (1 + wave)


def _rb_torsion(graph: Graph, edges: Sequence[Vector], of: Mapping[str, Any]) -> Node:
    cosine = -graph.apply("cos", geometry.dihedral(*edges))
    energy: Node = of["c5"]
    for n in (4, 3, 2, 1, 0):
        energy = of[f"c{n}"] + cosine * energy
    return energy


HARMONIC_BOND = TupleFormula(
    n_particles=2, edges=_BOND, item=("length", "k"), energy=_harmonic_bond
)
HARMONIC_ANGLE = TupleFormula(
    n_particles=3, edges=_ANGLE, item=("angle", "k"), energy=_harmonic_angle
)
PERIODIC_TORSION = TupleFormula(
    n_particles=4,
    edges=_DIHEDRAL,
    item=("periodicity", "phase", "k"),
    energy=_periodic_torsion,
)
RB_TORSION = TupleFormula(
    n_particles=4,
    edges=_DIHEDRAL,
    item=("c0", "c1", "c2", "c3", "c4", "c5"),
    energy=_rb_torsion,
)
