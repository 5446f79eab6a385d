"""The program over pairs: one cluster of particles with all clusters near it.

Every pair is computed from both sides, so that a program adds to its own particles only: no atomic
operations, and the same sums in the same order every time. Derivatives in entries of tables are the
exception.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from mdgraft.kernels.device import programs
from mdgraft.kernels.device.clusters import SIZE
from mdgraft.kernels.device.writer import Name, TextEmitter, Writer
from mdgraft.kernels.fused.graph import Node, Series, topological
from mdgraft.kernels.fused.pair_formulas import PairFormula, Task, pair_formulas

#: Warps of a program, each of which has some of the pairs of a tile, so that they need not spill.
_WARPS = 4


@dataclasses.dataclass(frozen=True)
class PairProgram:
    """A program and the layout of what it reads and writes.

    Attributes
    ----------
    text
        Its source. ``rows`` to ``masks`` are those of `clusters.ClusterList`. ``numbers`` ``(n,
        per)``: the squared cutoff, shared quantities, their directions if the program is of second
        order, constants, for each series a factor, a shift and coefficients, then tables and their
        directions; each row of them is for ``n_rows`` rows of tiles. ``turns`` ``(frames, images,
        3)``: what images add to the direction of positions. ``data`` ``(rows, n_inputs, SIZE)``,
        ``out`` ``(rows, n_outputs, SIZE)`` and ``sums`` ``(rows, n_sums + 9)`` float64, of which
        the last are derivatives in the box by what images add. ``totals`` ``(n, n_entries)``
        float64, zeros to begin with.
    n_inputs, n_outputs, n_sums
        Numbers that each particle brings and gets, and sums over all pairs: the energy first,
        unless the program is of second order, then derivatives in shared quantities.
    n_entries
        Entries of tables in which derivatives are taken.
    series
        Functions whose coefficients the numbers must hold, in this order.
    warps
        Of each program.
    """

    text: str
    n_inputs: int
    n_outputs: int
    n_sums: int
    n_entries: int
    series: tuple[Series, ...]
    warps: int

    def start(self, n_rows: int, *arguments: Any) -> None:
        """Start it for all rows of tiles."""
        function = programs.program("pairs", self.text)
        programs.start(function, (n_rows,), *arguments, warps=self.warps)


#: Arguments by name; pointers but for the last two.
ARGUMENTS = (
    *("rows", "segments", "image", "images", "columns", "offsets", "mask", "masks"),
    *("numbers", "turns", "data", "out", "sums", "totals", "n_rows", "n_images"),
)


@functools.lru_cache(maxsize=256)
def pair_program(formula: PairFormula, task: Task, double: bool) -> PairProgram:
    """The program for a formula in one precision."""
    return _PairWriter(formula, task, double).written()


class _PairWriter:
    def __init__(self, formula: PairFormula, task: Task, double: bool) -> None:
        self.formula, self.task = formula, task
        self.formulas = pair_formulas(formula, task)
        energy = () if self.formulas.energy is None else (self.formulas.energy,)
        self.sums: tuple[Node, ...] = (*energy, *self.formulas.shared)
        self.roots = [*self.sums, *self.formulas.slopes, *self.formulas.first]
        looked_up = self.formulas.looked_up
        #: Derivatives in entries of tables, and where these are.
        self.entries = [*self.formulas.entries, *(node.arguments[0] for node in looked_up)]
        self.n_entries = sum(size for _, size in formula.tables) if task.tables else 0
        everything = [*self.roots, *self.entries]
        found = (node.payload for node in topological(everything) if everything)
        self.series = tuple(dict.fromkeys(p for p in found if isinstance(p, Series)))
        self.inputs = ["x", "y", "z", *formula.particle]
        if task.second:
            self.inputs += [f"d{name}" for name in self.inputs]
        self.writer = Writer(double=double, shape="[1, 1]")
        self.emitter = TextEmitter(self.writer, self._coefficients, self._lookup)

    def written(self) -> PairProgram:
        writer = self.writer
        n_sums, n_inputs = len(self.sums), len(self.inputs)
        self.n_outputs = len(self.formulas.slopes) + len(self.formulas.first)
        writer.line("row = tl.program_id(0).to(tl.int64)")
        writer.line(f"lane = tl.arange(0, {SIZE})")
        writer.line("frame = row // n_rows")
        self._load_numbers()
        writer.line(f"own = data + row * {n_inputs * SIZE} + lane")
        self.rows = {
            name: writer.new(f"tl.load(own + {k * SIZE})[:, None]")
            for k, name in enumerate(self.inputs)
        }
        for k in range(self.n_outputs):
            writer.line(f"row{k} = tl.zeros([{SIZE}], {writer.number})")
        n_box = 9 if self.formulas.slopes else 0
        for k in range(n_sums + n_box):
            writer.line(f"sum{k} = tl.full([], 0.0, tl.float64)")
        with writer.block("for segment in range(tl.load(rows + row), tl.load(rows + row + 1)):"):
            self._segment()
        writer.line(f"target = out + row * {self.n_outputs * SIZE} + lane")
        for k in range(self.n_outputs):
            writer.line(f"tl.store(target + {k * SIZE}, row{k})")
        for k in range(n_sums + n_box):
            writer.line(f"tl.store(sums + row * {n_sums + 9} + {k}, sum{k})")
        head = '@triton.jit(do_not_specialize=["n_rows", "n_images"])\ndef pairs('
        text = "\n".join([head + ", ".join(ARGUMENTS) + "):", *writer.lines, ""])
        warps = 2 * _WARPS if self.task.second and writer.double else _WARPS
        return PairProgram(
            text, n_inputs, self.n_outputs, n_sums, self.n_entries, self.series, warps
        )

    def _load_numbers(self) -> None:
        formula, writer = self.formula, self.writer
        names = ["cutoff_squared", *formula.shared]
        if self.task.second:
            names += [f"d{name}" for name in formula.shared]
        names += formula.constants
        size = len(names) + sum(series.degree + 3 for series in self.series)
        self.tables: dict[str, int] = {}
        for prefix in ("", "d") if self.task.second else ("",):
            for name, n in formula.tables:
                self.tables[f"{prefix}{name}"] = size
                size += n
        writer.line(f"given = numbers + frame * {size}")
        self.common = {n: writer.loaded(f"given + {k}") for k, n in enumerate(names)}
        self.coefficients: dict[Series, list[Name]] = {}
        place = len(names)
        for series in self.series:
            places = range(place, place + series.degree + 3)
            self.coefficients[series] = [writer.loaded(f"given + {k}") for k in places]
            place = places.stop

    def _coefficients(self, series: Series) -> tuple[Sequence[Name], Name, Name]:
        factor, shift, *coefficients = self.coefficients[series]
        return coefficients, factor, shift

    def _lookup(self, table: str, index: Name) -> Name:
        place = f"given + {self.tables[table]} + {index}.to(tl.int32)"
        return self.writer.new(f"tl.load({place})")

    def _scatter(self, within: Name, results: Sequence[Name]) -> None:
        """Add derivatives in entries of tables."""
        nodes, first = self.formulas.looked_up, 0
        places = {}
        for name, size in self.formula.tables:
            places[name] = first
            first += size
        for node, slope, index in zip(
            nodes, results[: len(nodes)], results[len(nodes) :], strict=True
        ):
            place = f"frame * {self.n_entries} + {places[str(node.payload)]}"
            # In the shape of all pairs.
            whole = f"tl.where({within}, {index}, 0.0).to(tl.int32)"
            part = f"tl.where({within}, {slope}, 0.0).to(tl.float64)"
            self.writer.line(f"tl.atomic_add(totals + {place} + {whole}, {part}, mask={within})")

    def _segment(self) -> None:
        """Tiles of which all columns have the same image."""
        writer, slopes = self.writer, self.formulas.slopes
        writer.line("which = tl.load(image + segment)")
        if self.task.second:
            writer.line("turn = turns + (frame * n_images + which) * 3")
            self.turn = [writer.loaded(f"turn + {k}") for k in range(3)]
        for k in range(len(self.roots)):
            writer.line(f"all{k} = tl.zeros([{SIZE}, {SIZE}], {writer.number})")
        begin, end = "tl.load(segments + segment)", "tl.load(segments + segment + 1)"
        with writer.block(f"for tile in range({begin}, {end}):"):
            self._tile()
        n = len(self.sums)
        for k in range(n):
            wide = f"tl.sum(all{k}, axis=1).to(tl.float64)"
            writer.line(f"sum{k} += tl.sum({wide}, axis=0)")
        for k in range(self.n_outputs):
            writer.line(f"part{k} = tl.sum(all{n + k}, axis=1)")
            writer.line(f"row{k} {'-' if k < len(slopes) else '+'}= part{k}")
        for k in range(len(slopes)):
            writer.line(f"total{k} = tl.sum(part{k}.to(tl.float64), axis=0)")
            for axis in range(3):
                number = f"tl.load(images + which * 3 + {axis})"
                writer.line(f"sum{n + 3 * axis + k} += {number} * total{k}")

    def _tile(self) -> None:
        writer = self.writer
        writer.line("column = tl.load(columns + tile).to(tl.int64)")
        writer.line(f"other = data + column * {len(self.inputs) * SIZE} + lane")
        writer.line(f"bits = tl.load(masks + tl.load(mask + tile) * {SIZE} + lane)")
        values = dict(self.common)
        for k, name in enumerate(self.inputs):
            there, here = writer.new(f"tl.load(other + {k * SIZE})[None, :]"), self.rows[name]
            if name in ("x", "y", "z"):
                offset = writer.loaded(f"offsets + tile * 3 + {k}")
                values[name] = writer.new(f"({there} + {offset}) - {here}")
            elif name in ("dx", "dy", "dz"):
                turn = self.turn["xyz".index(name[1])]
                values[name] = writer.new(f"({there} + {turn}) - {here}")
            else:
                values[f"{name}_i"], values[f"{name}_j"] = here, there
        x, y, z = (values[axis] for axis in "xyz")
        square = writer.new(f"{x} * {x} + {y} * {y} + {z} * {z}")
        free = writer.new("((bits[:, None] >> lane[None, :]) & 1) == 0")
        within = writer.new(f"({square} < {self.common['cutoff_squared']}) & {free}")
        # What does not count must not divide by zero either.
        values["u"] = writer.new(f"tl.where({within}, {square}, 1.0)")
        n = len(self.roots)
        results = self.emitter.formulas([*self.roots, *self.entries], values)
        for k, result in enumerate(results[:n]):
            writer.line(f"all{k} += tl.where({within}, {result}, 0.0)")
        if self.entries:
            self._scatter(within, results[n:])
