"""The compiled loop over bonds, angles, torsions and other short lists of particles.

The same formulas run in two ways. For many frames, the lanes of a vector are frames: all that a
block of frames needs lies together, and each item of the list is loaded, evaluated and added
without gathering anything. For few frames, lanes are items, whose particles are gathered.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from llvmlite import ir

from mdgraft.kernels.fused import jit
from mdgraft.kernels.fused.emit import FLAGS, Emitter, Value
from mdgraft.kernels.fused.graph import (
    Graph,
    Node,
    Series,
    reverse_gradient,
    tangents,
    topological,
)
from mdgraft.kernels.fused.loops import DOUBLE, INDEX, INT32, LoopBuilder
from mdgraft.kernels.fused.pair_formulas import Task

#: Three components.
Vector: TypeAlias = "tuple[Node, Node, Node]"
#: Where an edge begins that leads to a particle's position as it is.
ORIGIN = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TupleFormula:
    """The energy of an item as a function of vectors between its particles.

    Attributes
    ----------
    n_particles
        Particles of an item.
    edges
        Pairs (from, to) of an item's particles; nearest images are taken of these vectors, but not
        of those from `ORIGIN`.
    item
        Names of the quantities that each item has.
    particle
        Names of the quantities that each particle has; a formula sees them as a tuple, one for
        each of the item's particles.
    framed
        Those among them that differ between frames.
    shared
        Names of quantities that all items share.
    constants
        Names of numbers that are known when the code runs, without derivatives.
    energy
        ``(graph, edge vectors, quantities by name) -> energy``.
    """

    n_particles: int
    edges: tuple[tuple[int, int], ...]
    item: tuple[str, ...]
    particle: tuple[str, ...] = ()
    framed: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    energy: Callable[[Graph, Sequence[Vector], Mapping[str, Any]], Node]


@dataclasses.dataclass(frozen=True)
class TupleFormulas:
    """Energy and derivatives, in the order of `roots`."""

    energy: Node | None
    edges: tuple[Node, ...]
    item: tuple[Node, ...]
    particle: tuple[Node, ...]
    shared: tuple[Node, ...]

    @property
    def roots(self) -> list[Node]:
        """All of them."""
        first = [] if self.energy is None else [self.energy]
        return [*first, *self.edges, *self.item, *self.particle, *self.shared]


def tuple_formulas(formula: TupleFormula, task: Task, *, framed_only: bool) -> TupleFormulas:
    """The energy of an item and those of its derivatives that the task names."""
    graph = Graph()
    vectors = [
        (graph.input(f"x{e}"), graph.input(f"y{e}"), graph.input(f"z{e}"))
        for e in range(len(formula.edges))
    ]
    item = [graph.input(name) for name in formula.item]
    particle = [
        [graph.input(f"{name}_{p}") for p in range(formula.n_particles)]
        for name in formula.particle
    ]
    shared = [graph.input(name) for name in formula.shared]
    quantities: dict[str, Any] = {
        **dict(zip(formula.item, item, strict=True)),
        **{name: tuple(of) for name, of in zip(formula.particle, particle, strict=True)},
        **dict(zip(formula.shared, shared, strict=True)),
        **{name: graph.input(name) for name in formula.constants},
    }
    energy = formula.energy(graph, vectors, quantities)
    groups: list[list[Node]] = [
        [component for vector in vectors for component in vector] if task.positions else [],
        item if task.particle else [],
        [node for of in particle for node in of] if task.particle else [],
        shared if task.shared else [],
    ]
    flat = [node for group in groups for node in group]
    slopes = iter(reverse_gradient(energy, flat))
    parts = [[next(slopes) for _ in group] for group in groups]
    if framed_only and task.particle:
        zero = graph.constant(0.0)
        own = [
            name in formula.framed for name in formula.particle for _ in range(formula.n_particles)
        ]
        parts[1] = [zero for _ in item]
        parts[2] = [part if on else zero for part, on in zip(parts[2], own, strict=True)]
    if not task.second:
        return TupleFormulas(energy, *(tuple(part) for part in parts))
    everything = [*(c for v in vectors for c in v), *item, *shared]
    everything += [node for of in particle for node in of]
    seeds = {node: graph.input(f"d{node.payload}") for node in everything}
    return TupleFormulas(None, *(tuple(tangents(part, seeds)) if part else () for part in parts))


@dataclasses.dataclass(frozen=True)
class TupleLoop:
    """A compiled loop.

    Attributes
    ----------
    function
        The code; `ARRAYS` says what it takes.
    lanes
        Length of vectors.
    series
        Functions whose coefficients follow the constants among the numbers, in this order.
    """

    function: Any
    lanes: int
    series: tuple[Series, ...]


@functools.lru_cache(maxsize=512)
def compiled_tuples(
    formula: TupleFormula,
    task: Task,
    *,
    double: bool,
    periodic: bool,
    by_frame: bool,
    framed_only: bool = False,
) -> TupleLoop:
    """The loop for a formula in one precision.

    If ``framed_only``, derivatives in quantities that all frames share are left at zero.
    """
    scalar = ir.DoubleType() if double else ir.FloatType()
    lanes = max(4, jit.lanes(8 if double else 4))
    formulas = tuple_formulas(formula, task, framed_only=framed_only)
    emitter = _Emitter(formula, task, formulas, scalar, lanes, periodic=periodic, by_frame=by_frame)
    types = [ctypes.c_int64] * 4 + [ctypes.c_void_p] * len(ARRAYS)
    return TupleLoop(jit.compiled("tuples", emitter.emit(), types), lanes, emitter.series)


#: What the compiled function takes after ``begin, end, n_items, n_particles``. Blocks are of
#: frames or of items, W is the length of a vector, n and m count the formula's quantities of items
#: and of particles, k = 3, or 6 at second order, where directions follow what they belong to.
#:
#: ==================  ====================  =============================  ====================
#: array               by frame              by item                        of
#: ==================  ====================  =============================  ====================
#: particles           (items, P)            (blocks, P, W)                 int32
#: numbers             shared quantities, constants, tables of series
#: box                 (blocks, 3 k, W)      (3 k,)
#: positions           (blocks, N, k, W)     (N, k)
#: items               (items, n)            (blocks, n, W)
#: particle            (N, m)                (N, m)                         not framed
#: framed              (blocks, N, m, W)     (N, m)                         framed ones
#: shared_moves        (blocks, S, W)        (S,)                           second order only
#: item_moves          (blocks, items, n, W) (blocks, n, W)                 second order only
#: particle_moves      (blocks, N, m, W)     (N, m)                         second order only
#: sums                (blocks, 10 + S, W)   (10 + S,): energy, box, shared float64
#: of_positions        (blocks, N, 3, W)     (N, 3)
#: of_items            (blocks, items, n, W) (blocks, n, W)
#: of_particles        (blocks, N, m, W)     (N, m)
#: ==================  ====================  =============================  ====================
ARRAYS = (
    "particles",
    "numbers",
    "box",
    "positions",
    "items",
    "particle",
    "framed",
    "shared_moves",
    "item_moves",
    "particle_moves",
    "sums",
    "of_positions",
    "of_items",
    "of_particles",
)


class _Emitter:
    """Writes ``tuples(begin, end, n_items, n_particles, *ARRAYS)`` over blocks."""

    def __init__(
        self,
        formula: TupleFormula,
        task: Task,
        formulas: TupleFormulas,
        scalar: Any,
        lanes: int,
        *,
        periodic: bool,
        by_frame: bool,
    ) -> None:
        self.formula, self.task, self.scalar, self.lanes = formula, task, scalar, lanes
        self.periodic, self.by_frame = periodic, by_frame
        self.formulas = formulas
        self.size = 6 if task.second else 3
        self.series = tuple(
            dict.fromkeys(
                node.payload
                for node in topological(self.formulas.roots)
                if isinstance(node.payload, Series)
            )
        )

    def emit(self) -> str:
        number = self.scalar.as_pointer()
        arrays: dict[str, Any] = dict.fromkeys(ARRAYS, number)
        arrays["particles"], arrays["sums"] = INT32.as_pointer(), DOUBLE.as_pointer()
        types = [INDEX] * 4 + list(arrays.values())
        self.code = code = LoopBuilder("tuples", types, self.scalar, self.lanes)
        self.builder = code.builder
        self.emitter = Emitter(code.builder, self.scalar, self.lanes, self._coefficients)
        begin, end, self.n_items, self.n_particles, *pointers = code.arguments
        self.array = dict(zip(ARRAYS, pointers, strict=True))
        formula = self.formula
        self.numbers = {
            name: self.emitter.broadcast(code.at(self.array["numbers"], INDEX(k)))
            for k, name in enumerate((*formula.shared, *formula.constants))
        }
        self.wide = ir.VectorType(DOUBLE, self.lanes)
        self.totals = [code.builder.alloca(self.wide) for _ in range(10 + len(formula.shared))]
        if self.by_frame:
            code.loop(begin, end, self._frames)
        else:
            self._start(None)
            code.loop(begin, end, self._items)
            self._finish(None)
        return code.text()

    def _coefficients(self, series: Series) -> tuple[list[Value], Value, Value]:
        place = len(self.formula.shared) + len(self.formula.constants)
        for other in self.series:
            if other == series:
                break
            place += other.degree + 3
        values = [
            self.emitter.broadcast(self.code.at(self.array["numbers"], INDEX(place + k)))
            for k in range(series.degree + 3)
        ]
        return values[2:], values[0], values[1]

    # Blocks -----------------------------------------------------------------------------------

    def _frames(self, block: Value) -> None:
        self._start(block)
        self.block = block
        self.code.loop(INDEX(0), self.n_items, self._item)
        self._finish(block)

    def _items(self, block: Value) -> None:
        self.block = block
        lane = ir.Constant(ir.VectorType(INDEX, self.lanes), [INDEX(k) for k in range(self.lanes)])
        left = self.builder.sub(self.n_items, self.code.place(block, self.lanes))
        single = self.builder.insert_element(ir.Constant(lane.type, ir.Undefined), left, INT32(0))
        zeros = ir.Constant(ir.VectorType(INT32, self.lanes), [INT32(0)] * self.lanes)
        every = self.builder.shuffle_vector(single, single, zeros)
        self.valid = self.builder.icmp_signed("<", lane, every)
        self._item(block)

    def _start(self, block: Value | None) -> None:
        """Load what all items of a block share."""
        zero = ir.Constant(self.wide, [DOUBLE(0.0)] * self.lanes)
        for total in self.totals:
            self.builder.store(zero, total)
        self.cell = []
        if self.periodic:
            self.cell = [
                self._own(self.array["box"], block, self.size * 3, k) for k in range(self.size * 3)
            ]
        self.moves = {}
        if self.task.second:
            n = len(self.formula.shared)
            self.moves = {
                f"d{name}": self._own(self.array["shared_moves"], block, n, k)
                for k, name in enumerate(self.formula.shared)
            }

    def _own(self, array: Value, block: Value | None, n: int, k: int) -> Value:
        """A quantity of each frame, or one that is the same in all lanes."""
        if block is None:
            return self.emitter.broadcast(self.code.at(array, INDEX(k)))
        return self.code.load(array, self.code.place(block, n * self.lanes, k * self.lanes))

    def _finish(self, block: Value | None) -> None:
        """Add the sums over items to those of the frames."""
        builder, n = self.builder, len(self.totals)
        for k, total in enumerate(self.totals):
            value = builder.load(total)
            if block is None:
                number = DOUBLE(0.0)
                for lane in range(self.lanes):
                    number = builder.fadd(number, builder.extract_element(value, INT32(lane)))
                self.code.add_at(self.array["sums"], INDEX(k), number)
            else:
                place = self.code.place(block, n * self.lanes, k * self.lanes)
                pointer = builder.bitcast(
                    builder.gep(self.array["sums"], [place]), self.wide.as_pointer()
                )
                known = builder.load(pointer, align=8)
                builder.store(builder.fadd(known, value), pointer, align=8)

    # An item, or as many as there are lanes ---------------------------------------------------

    def _item(self, item: Value) -> None:
        formula, builder = self.formula, self.builder
        self.item = item
        members = [self._member(item, p) for p in range(formula.n_particles)]
        places = [self._position(member) for member in members]
        values = {**self.numbers, **self.moves}
        n = len(formula.item)
        for k, name in enumerate(formula.item):
            if self.by_frame:
                place = self.code.place(item, n, k)
                values[name] = self.emitter.broadcast(self.code.at(self.array["items"], place))
            else:
                values[name] = self.code.load(
                    self.array["items"], self.code.place(item, n * self.lanes, k * self.lanes)
                )
            if self.task.second:
                values[f"d{name}"] = self.code.load(self.array["item_moves"], self._of_item(k))
        for p, member in enumerate(members):
            for k, name in enumerate(formula.particle):
                values[f"{name}_{p}"] = self._quantity(member, k)
                if self.task.second:
                    values[f"d{name}_{p}"] = self._moved(
                        self.array["particle_moves"], member, len(formula.particle), k
                    )
        images: list[list[Value]] = []
        for e, (start, end) in enumerate(formula.edges):
            if start == ORIGIN:
                vector = places[end]
                images.append([])
            else:
                vector = [
                    builder.fsub(b, a, flags=FLAGS)
                    for a, b in zip(places[start], places[end], strict=True)
                ]
                images.append(self._nearest(vector))
            for axis, component in zip(("x", "y", "z", "dx", "dy", "dz"), vector, strict=False):
                values[f"{axis}{e}"] = component
        results = iter(self.emitter.formulas(self.formulas.roots, values))
        if self.formulas.energy is not None:
            self._count(0, next(results))
        if self.formulas.edges:
            self._add_slopes(members, images, [next(results) for _ in self.formulas.edges])
        if self.formulas.item or self.formulas.particle:
            for k in range(n):
                self.code.store(
                    self._masked(next(results)), self.array["of_items"], self._of_item(k)
                )
            of_particle = [[next(results) for _ in members] for _ in formula.particle]
            for p, member in enumerate(members):
                changes = [of[p] for of in of_particle]
                self._add(self.array["of_particles"], member, changes)
        for k, change in enumerate(results):
            self._count(10 + k, change)

    def _nearest(self, vector: list[Value]) -> list[Value]:
        """Turn a vector, and its direction, into that to the nearest image; numbers of boxes."""
        if not self.periodic:
            return []
        builder, images = self.builder, []
        half = self.emitter.constant(0.5)
        for axis in (2, 1, 0):
            ratio = builder.fdiv(vector[axis], self.cell[4 * axis])
            n = self.emitter.intrinsic("floor", [builder.fadd(ratio, half)])
            for k in range(self.size):
                row = 3 * axis + k if k < 3 else 9 + 3 * axis + k - 3
                shift = builder.fmul(n, self.cell[row], flags=FLAGS)
                vector[k] = builder.fsub(vector[k], shift, flags=FLAGS)
            images.append(n)
        return images[::-1]

    def _add_slopes(
        self, members: list[Value], images: list[list[Value]], slopes: list[Value]
    ) -> None:
        builder = self.builder
        totals: list[list[Value] | None] = [None] * len(members)
        for e, (start, end) in enumerate(self.formula.edges):
            slope = slopes[3 * e : 3 * e + 3]
            for p, combine, negate in ((end, builder.fadd, False), (start, builder.fsub, True)):
                if p == ORIGIN:
                    continue
                known = totals[p]
                if known is None:
                    totals[p] = [builder.fneg(s) for s in slope] if negate else list(slope)
                else:
                    totals[p] = [combine(a, b) for a, b in zip(known, slope, strict=True)]
            for axis, n in enumerate(images[e]):
                for k, component in enumerate(slope):
                    self._count(1 + 3 * axis + k, builder.fneg(builder.fmul(n, component)))
        for member, total in zip(members, totals, strict=True):
            if total is not None:
                self._add(self.array["of_positions"], member, total)

    def _masked(self, value: Value) -> Value:
        if self.by_frame:
            return value
        return self.builder.select(self.valid, value, self.emitter.constant(0.0))

    def _count(self, k: int, value: Value) -> None:
        value = self._masked(value)
        if self.scalar != DOUBLE:
            value = self.builder.fpext(value, self.wide)
        total = self.builder.fadd(self.builder.load(self.totals[k]), value)
        self.builder.store(total, self.totals[k])

    # Particles --------------------------------------------------------------------------------

    def _member(self, item: Value, p: int) -> Any:
        """The index of an item's particle; one for each lane if lanes are items."""
        array, n = self.array["particles"], self.formula.n_particles
        if self.by_frame:
            return self.builder.sext(self.code.at(array, self.code.place(item, n, p)), INDEX)
        start = self.code.place(item, n * self.lanes, p * self.lanes)
        return [
            self.builder.sext(self.code.at(array, self.builder.add(start, INDEX(lane))), INDEX)
            for lane in range(self.lanes)
        ]

    def _position(self, member: Any) -> list[Value]:
        return [
            self._moved(self.array["positions"], member, self.size, k) for k in range(self.size)
        ]

    def _moved(self, array: Value, member: Any, n: int, k: int) -> Value:
        """A quantity of a particle that differs between frames."""
        if self.by_frame:
            return self.code.load(array, self._of_particle(member, n, k))
        return self._gathered(array, member, n, k)

    def _quantity(self, member: Any, k: int) -> Value:
        """A quantity of a particle."""
        formula = self.formula
        common = [name for name in formula.particle if name not in formula.framed]
        name = formula.particle[k]
        if name in formula.framed:
            own = [name for name in formula.particle if name in formula.framed]
            return self._moved(self.array["framed"], member, len(own), own.index(name))
        array, n, k = self.array["particle"], len(common), common.index(name)
        if self.by_frame:
            return self.emitter.broadcast(self.code.at(array, self.code.place(member, n, k)))
        return self._gathered(array, member, n, k)

    def _gathered(self, array: Value, member: list[Value], n: int, k: int) -> Value:
        result = ir.Constant(self.emitter.vector, ir.Undefined)
        for lane, index in enumerate(member):
            value = self.code.at(array, self.code.place(index, n, k))
            result = self.builder.insert_element(result, value, INT32(lane))
        return result

    def _add(self, array: Value, member: Any, values: list[Value]) -> None:
        """Add to quantities of a particle."""
        n = len(values)
        for k, value in enumerate(values):
            if self.by_frame:
                place = self._of_particle(member, n, k)
                total = self.builder.fadd(self.code.load(array, place), value)
                self.code.store(total, array, place)
                continue
            value = self._masked(value)
            for lane, index in enumerate(member):
                number = self.builder.extract_element(value, INT32(lane))
                self.code.add_at(array, self.code.place(index, n, k), number)

    def _of_particle(self, member: Value, n: int, k: int) -> Value:
        """Where the vector of a particle's quantity lies, in blocks of frames."""
        particle = self.builder.add(self.builder.mul(self.block, self.n_particles), member)
        return self.code.place(particle, n * self.lanes, k * self.lanes)

    def _of_item(self, k: int) -> Value:
        """Where the vector of an item's quantity lies."""
        item = self.item
        if self.by_frame:
            item = self.builder.add(self.builder.mul(self.block, self.n_items), item)
        return self.code.place(item, len(self.formula.item) * self.lanes, k * self.lanes)
