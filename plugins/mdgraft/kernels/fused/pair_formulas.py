"""The energy of a pair of particles and its derivatives, as formulas that others emit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mdgraft.kernels.fused.graph import Graph, Node, gradient, tangents, topological


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairFormula:
    """The energy of a pair as a function of its squared distance.

    Attributes
    ----------
    particle
        Names of the quantities that each particle has.
    framed
        Those among them that differ between frames.
    shared
        Names of quantities that all pairs share, in which derivatives are taken.
    constants
        Names of numbers that are known when the code runs, without derivatives.
    tables
        Names and sizes of tables in which pairs look entries up, `Graph.lookup`.
    energy
        ``(graph, squared distance, first, second, shared and constants) -> energy``, where
        ``first`` and ``second`` hold the particles' quantities by name.
    """

    particle: tuple[str, ...]
    shared: tuple[str, ...]
    constants: tuple[str, ...]
    framed: tuple[str, ...] = ()
    tables: tuple[tuple[str, int], ...] = ()
    energy: Callable[
        [Graph, Node, Mapping[str, Node], Mapping[str, Node], Mapping[str, Node]], Node
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a loop computes beside or, if ``second``, instead of energies.

    Attributes
    ----------
    positions, particle, shared, tables
        Whether derivatives in these are computed.
    second
        Whether it is changes of these derivatives when everything changes along directions.
    """

    positions: bool = False
    particle: bool = False
    shared: bool = False
    tables: bool = False
    second: bool = False


@dataclasses.dataclass(frozen=True)
class PairFormulas:
    """Energy and derivatives, in the order of `roots`."""

    energy: Node | None
    slopes: tuple[Node, ...]
    first: tuple[Node, ...]
    second: tuple[Node, ...]
    shared: tuple[Node, ...]
    #: Derivatives in entries of tables, and the nodes that look these up.
    entries: tuple[Node, ...]
    looked_up: tuple[Node, ...]

    @property
    def roots(self) -> list[Node]:
        """All of them, and the indices after them."""
        energy = [] if self.energy is None else [self.energy]
        derivatives = [*self.slopes, *self.first, *self.second, *self.shared, *self.entries]
        return [*energy, *derivatives, *(node.arguments[0] for node in self.looked_up)]


def pair_formulas(formula: PairFormula, task: Task) -> PairFormulas:
    """The pair energy and those of its derivatives that the task names."""
    graph = Graph()
    vector = [graph.input(axis) for axis in "xyz"]
    u = graph.input("u")
    first = {name: graph.input(f"{name}_i") for name in formula.particle}
    second = {name: graph.input(f"{name}_j") for name in formula.particle}
    common = {name: graph.input(name) for name in (*formula.shared, *formula.constants)}
    energy = formula.energy(graph, u, first, second, common)
    slopes: list[Node] = []
    if task.positions:
        (in_u,) = gradient(energy, [u])
        slopes = [2.0 * in_u * component for component in vector]
    quantities = [*first.values(), *second.values()] if task.particle else []
    numbers = [common[name] for name in formula.shared] if task.shared else []
    looked = [node for node in topological([energy]) if node.operation == "lookup"]
    entries = looked if task.tables else []
    partial = gradient(energy, [*quantities, *numbers, *entries])
    n, end = len(formula.particle) if task.particle else 0, len(partial) - len(entries)
    parts = (slopes, partial[:n], partial[n : 2 * n], partial[2 * n : end], partial[end:])
    if not task.second:
        return _found(energy, parts, entries)
    change = [graph.input(f"d{axis}") for axis in "xyz"]
    seeds = dict(zip(vector, change, strict=True))
    seeds[u] = 2.0 * sum((a * b for a, b in seeds.items()), start=graph.constant(0.0))
    for name in formula.particle:
        seeds[first[name]] = graph.input(f"d{name}_i")
        seeds[second[name]] = graph.input(f"d{name}_j")
    for name in formula.shared:
        seeds[common[name]] = graph.input(f"d{name}")
    for node in looked:
        seeds[node] = graph.lookup(f"d{node.payload}", *node.arguments)
    turned = [tangents(part, seeds) if part else [] for part in parts]
    return _found(None, turned, entries)


def _found(
    energy: Node | None, parts: Sequence[Sequence[Node]], looked_up: Sequence[Node]
) -> PairFormulas:
    slopes, first, second, shared, entries = map(tuple, parts)
    return PairFormulas(energy, slopes, first, second, shared, entries, tuple(looked_up))
