"""The compiled loop over pairs: tiles of four particles times one vector of particles.

Particles come sorted into clusters as long as a vector register, and all quantities of a cluster
lie together. A tile pairs four particles, one after the other, with all lanes of a cluster, so that
nothing is gathered or scattered (S. Pall and B. Hess, Comput. Phys. Commun. 184, 2641 (2013)).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from llvmlite import ir

from mdgraft.kernels.fused import jit
from mdgraft.kernels.fused.emit import FLAGS, Emitter, Value
from mdgraft.kernels.fused.graph import Series, topological
from mdgraft.kernels.fused.loops import DOUBLE, INDEX, INT32, LoopBuilder
from mdgraft.kernels.fused.pair_formulas import PairFormula, PairFormulas, Task, pair_formulas

#: Particles that a tile takes one after the other.
ROWS = 4
#: Numbers that describe a row of tiles, see `emit_loop`.
ROW_FIELDS = 6


@dataclasses.dataclass(frozen=True)
class Loop:
    """A compiled loop and the layout of what it reads and writes.

    Attributes
    ----------
    function
        The code, see `emit_loop` for its arguments.
    lanes
        Particles in a cluster.
    n_inputs, n_outputs
        Numbers that each particle brings and gets.
    series
        Functions whose coefficients the table of numbers must hold, in this order.
    n_sums
        Sums over all pairs: the energy first unless the loop is of second order, then derivatives
        in shared quantities, then those in the entries of all tables.
    """

    function: Any
    lanes: int
    n_inputs: int
    n_outputs: int
    series: tuple[Series, ...]
    n_sums: int


@functools.lru_cache(maxsize=256)
def compiled_loop(formula: PairFormula, task: Task, double: bool) -> Loop:
    """The loop for a formula in one precision."""
    formulas = pair_formulas(formula, task)
    scalar = ir.DoubleType() if double else ir.FloatType()
    lanes = max(ROWS, jit.lanes(8 if double else 4))
    series = tuple(
        dict.fromkeys(
            node.payload for node in topological(formulas.roots) if isinstance(node.payload, Series)
        )
    )
    loop = _LoopEmitter(formula, task, formulas, scalar, lanes, series)
    pointer = ctypes.c_void_p
    number = ctypes.c_int64
    function = jit.compiled("pairs", loop.emit(), [number, number, *(pointer,) * 9])
    return Loop(function, lanes, loop.n_inputs, loop.n_outputs, series, loop.n_sums)


class _LoopEmitter:
    """Writes ``pairs(begin, end, rows, tiles, masks, numbers, shifts, origins, data, out, sums)``.

    ``rows`` ``(n, ROW_FIELDS)`` int64 lists for each row of tiles its four particles (as their
    index over four), its shift, where its tiles begin, where those begin that need no mask, where
    they end, and where its masks begin; ``tiles`` int32 are clusters; ``masks`` int64 have one bit
    a pair, lanes fastest. ``numbers`` are the squared cutoff, shared quantities, their directions
    if the loop is of second order, constants, for each series a factor, a shift and coefficients,
    then tables and, at second order, their directions. ``shifts`` ``(n, 3)`` float64 are added to
    the four particles (second order: ``(n, 6)``, the last three are the direction). Positions in
    ``data`` are relative to their cluster's of ``origins`` ``(clusters, 3)`` float64: short vectors
    lose nothing in single precision, wherever in the box they are. ``data``
    ``(clusters, n_inputs, lanes)`` and ``out`` ``(clusters, n_outputs, lanes)`` belong to
    particles, ``sums`` float64 ``(n_sums + 3 shifts,)`` to all pairs and, derivatives in the
    shifts, to each shift.
    """

    def __init__(
        self,
        formula: PairFormula,
        task: Task,
        formulas: PairFormulas,
        scalar: Any,
        lanes: int,
        series: tuple[Series, ...],
    ) -> None:
        self.formula, self.task, self.formulas = formula, task, formulas
        self.scalar, self.lanes, self.series = scalar, lanes, series
        axes = ("x", "y", "z")
        inputs = [*axes, *formula.particle]
        if task.second:
            inputs += [f"d{name}" for name in inputs]
        self.inputs = inputs
        self.n_inputs = len(inputs)
        self.n_outputs = len(formulas.slopes) + len(formulas.first)
        self.n_totals = len(formulas.shared) + (formulas.energy is not None)
        #: Where derivatives in the entries of each table begin.
        self.entries: dict[str, int] = {}
        self.n_sums = self.n_totals
        for name, size in formula.tables if task.tables else ():
            self.entries[name] = self.n_sums
            self.n_sums += size

    # The function -----------------------------------------------------------------------------

    def emit(self) -> str:
        number, integers = self.scalar.as_pointer(), INDEX.as_pointer()
        types = [INDEX, INDEX, integers, INT32.as_pointer(), integers]
        types += [number, *[DOUBLE.as_pointer()] * 2, number, number, DOUBLE.as_pointer()]
        self.code = LoopBuilder("pairs", types, self.scalar, self.lanes)
        self.begin, self.end, self.rows, self.tiles, self.masks = self.code.arguments[:5]
        self.numbers, self.shifts, self.origins = self.code.arguments[5:8]
        self.data, self.out, self.sums = self.code.arguments[8:]
        self.builder = self.code.builder
        self.emitter = Emitter(
            self.builder, self.scalar, self.lanes, self._coefficients, self._lookup
        )
        self._allocate()
        self._load_numbers()
        self.code.loop(self.begin, self.end, self._row)
        return self.code.text()

    def _allocate(self) -> None:
        """Sums of the row that is being worked on; the compiler keeps them in registers."""
        n = self.n_outputs

        def vectors(count: int) -> list[Value]:
            return [self.builder.alloca(self.emitter.vector) for _ in range(count)]

        self.of_rows = [vectors(n) for _ in range(ROWS)]
        self.of_all = vectors(self.n_totals)

    def _load_numbers(self) -> None:
        formula = self.formula
        names = ["cutoff_squared", *formula.shared]
        if self.task.second:
            names += [f"d{name}" for name in formula.shared]
        names += formula.constants
        self.common = {
            name: self.emitter.broadcast(self.code.at(self.numbers, INDEX(k)))
            for k, name in enumerate(names)
        }
        self.series_at: dict[Series, int] = {}
        place = len(names)
        for series in self.series:
            self.series_at[series] = place
            place += series.degree + 3
        self.tables_at: dict[str, int] = {}
        for prefix in ("", "d") if self.task.second else ("",):
            for name, size in formula.tables:
                self.tables_at[f"{prefix}{name}"] = place
                place += size

    def _lookup(self, table: str, index: Value) -> Value:
        """Entries of a table, one for each lane."""
        builder, first = self.builder, INDEX(self.tables_at[table])
        result = ir.Constant(self.emitter.vector, ir.Undefined)
        for lane, place in enumerate(self._places(index, first)):
            entry = self.code.at(self.numbers, place)
            result = builder.insert_element(result, entry, INT32(lane))
        return result

    def _places(self, index: Value, first: Value) -> list[Value]:
        """Places of entries from ``first`` on, one for each lane."""
        whole = self.builder.fptosi(index, ir.VectorType(INT32, self.lanes))
        places = []
        for lane in range(self.lanes):
            one = self.builder.extract_element(whole, INT32(lane))
            places.append(self.builder.add(self.builder.sext(one, INDEX), first))
        return places

    def _scatter(self, within: Value, slopes: list[Value], indices: list[Value]) -> None:
        """Add derivatives in entries of tables, where any pair of the lanes counts."""
        builder = self.builder
        bits = builder.bitcast(within, ir.IntType(self.lanes))
        with builder.if_then(builder.icmp_unsigned("!=", bits, bits.type(0))):
            nodes = self.formulas.looked_up
            for node, slope, index in zip(nodes, slopes, indices, strict=True):
                counted = builder.select(within, slope, self.emitter.constant(0.0))
                places = self._places(index, INDEX(self.entries[str(node.payload)]))
                for lane, place in enumerate(places):
                    part = builder.extract_element(counted, INT32(lane))
                    self.code.add_at(self.sums, place, self.code.precise(part))

    def _coefficients(self, series: Series) -> tuple[list[Value], Value, Value]:
        place = self.series_at[series]
        values = [
            self.emitter.broadcast(self.code.at(self.numbers, INDEX(place + k)))
            for k in range(series.degree + 3)
        ]
        return values[2:], values[0], values[1]

    # A row of tiles ---------------------------------------------------------------------------

    def _row(self, row: Value) -> None:
        builder, emitter = self.builder, self.emitter
        base = builder.mul(row, INDEX(ROW_FIELDS))
        four, shift, begin, middle, end, first_mask = (
            self.code.at(self.rows, builder.add(base, INDEX(k))) for k in range(ROW_FIELDS)
        )
        zero = emitter.constant(0.0)
        for place in (*(p for own in self.of_rows for p in own), *self.of_all):
            builder.store(zero, place)
        particle = builder.mul(four, INDEX(ROWS))
        cluster = builder.sdiv(particle, INDEX(self.lanes))
        lane = builder.srem(particle, INDEX(self.lanes))
        source = builder.add(builder.mul(cluster, INDEX(self.n_inputs * self.lanes)), lane)
        n_shifts = 6 if self.task.second else 3
        # Where the four are, but for what their data say.
        self.base = {}
        for k, name in enumerate(("x", "y", "z", "dx", "dy", "dz")[:n_shifts]):
            place = builder.add(builder.mul(shift, INDEX(n_shifts)), INDEX(k))
            self.base[name] = self.code.at(self.shifts, place)
            if k < 3:
                origin = self.code.at(self.origins, self.code.place(cluster, 3, k))
                self.base[name] = builder.fadd(self.base[name], origin)
        rows = []
        for i in range(ROWS):
            values = {}
            for k, name in enumerate(self.inputs):
                value = self.code.at(self.data, builder.add(source, INDEX(k * self.lanes + i)))
                values[name] = emitter.broadcast(value)
            rows.append(values)

        def masked(tile: Value) -> None:
            place = builder.add(first_mask, builder.sub(tile, begin))
            self._tile(tile, rows, self.code.at(self.masks, place))

        self.code.loop(begin, middle, masked)
        self.code.loop(middle, end, lambda tile: self._tile(tile, rows, None))
        target = builder.add(builder.mul(cluster, INDEX(self.n_outputs * self.lanes)), lane)
        of_shift = [self.scalar(0.0)] * len(self.formulas.slopes)
        for i in range(ROWS):
            for k, accumulator in enumerate(self.of_rows[i]):
                total = emitter.total(builder.load(accumulator))
                place = builder.add(target, INDEX(k * self.lanes + i))
                self.code.add_at(self.out, place, total)
                if k < len(of_shift):
                    of_shift[k] = builder.fadd(of_shift[k], total)
        precise = self.code.precise
        for k, accumulator in enumerate(self.of_all):
            self.code.add_at(self.sums, INDEX(k), precise(emitter.total(builder.load(accumulator))))
        for k, value in enumerate(of_shift):
            place = builder.add(builder.mul(shift, INDEX(3)), INDEX(self.n_sums + k))
            self.code.add_at(self.sums, place, precise(value))

    # A tile -----------------------------------------------------------------------------------

    def _tile(self, tile: Value, rows: list[dict[str, Value]], mask: Value | None) -> None:
        builder = self.builder
        cluster = builder.sext(self.code.at(self.tiles, tile), INDEX)
        code, lanes = self.code, self.lanes
        source = code.place(cluster, self.n_inputs * lanes)
        columns = {
            name: code.load(self.data, builder.add(source, INDEX(k * lanes)))
            for k, name in enumerate(self.inputs)
        }
        for k, name in enumerate(self.base):
            # Between the origins of the cluster and of the four.
            distance = builder.fneg(self.base[name])
            if k < 3:
                origin = code.at(self.origins, code.place(cluster, 3, k))
                distance = builder.fsub(origin, self.base[name])
            if self.scalar != DOUBLE:
                distance = builder.fptrunc(distance, self.scalar)
            columns[name] = builder.fadd(columns[name], self.emitter.broadcast(distance))
        target = code.place(cluster, self.n_outputs * lanes)
        places = [builder.add(target, INDEX(k * lanes)) for k in range(self.n_outputs)]
        sums = [code.load(self.out, place) for place in places]
        for i, row in enumerate(rows):
            sums = self._pairs(i, row, columns, mask, sums)
        for value, place in zip(sums, places, strict=True):
            code.store(value, self.out, place)

    def _pairs(
        self,
        i: int,
        row: Mapping[str, Value],
        columns: Mapping[str, Value],
        mask: Value | None,
        sums: list[Value],
    ) -> list[Value]:
        """One particle with all lanes; returns the sums that belong to the lanes."""
        builder, emitter = self.builder, self.emitter
        values = dict(self.common)
        for name in self.inputs:
            if name.removeprefix("d") in ("x", "y", "z"):
                values[name] = builder.fsub(columns[name], row[name], flags=FLAGS)
            else:
                values[f"{name}_i"], values[f"{name}_j"] = row[name], columns[name]
        squares = [builder.fmul(values[axis], values[axis], flags=FLAGS) for axis in "xyz"]
        distance = builder.fadd(squares[0], squares[1], flags=FLAGS)
        distance = builder.fadd(distance, squares[2], flags=FLAGS)
        within = builder.fcmp_ordered("<", distance, self.common["cutoff_squared"])
        if mask is not None:
            bits = builder.lshr(mask, mask.type(i * self.lanes))
            bits = builder.trunc(bits, ir.IntType(self.lanes))
            within = builder.and_(within, builder.bitcast(bits, within.type))
        # What does not count must not divide by zero either.
        values["u"] = builder.select(within, distance, emitter.constant(1.0))
        formulas = self.formulas
        results = emitter.formulas(formulas.roots, values)
        start = 0 if formulas.energy is None else 1
        n_slopes, n_particle = len(formulas.slopes), len(formulas.first)
        slopes = results[start : start + n_slopes]
        first = results[start + n_slopes : start + n_slopes + n_particle]
        second = results[start + n_slopes + n_particle : start + n_slopes + 2 * n_particle]
        rest = results[start + n_slopes + 2 * n_particle :]
        n_shared, n_entries = len(formulas.shared), len(formulas.entries)
        overall = [*results[:start], *rest[:n_shared]]
        if n_entries:
            entries, indices = rest[n_shared:][:n_entries], rest[n_shared + n_entries :]
            self._scatter(within, entries, indices)

        def counted(total: Value, change: Value, combine: Any) -> Value:
            return builder.select(within, combine(total, change, flags=FLAGS), total)

        for place, change in zip(self.of_all, overall, strict=True):
            builder.store(counted(builder.load(place), change, builder.fadd), place)
        for k, place in enumerate(self.of_rows[i]):
            change, combine = (
                (slopes[k], builder.fsub) if k < n_slopes else (first[k - n_slopes], builder.fadd)
            )
            builder.store(counted(builder.load(place), change, combine), place)
        return [
            counted(total, change, builder.fadd)
            for total, change in zip(sums, [*slopes, *second], strict=True)
        ]
