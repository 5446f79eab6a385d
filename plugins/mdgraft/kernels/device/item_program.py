"""Programs over items: bonds, angles, torsions and other short lists of particles.

One program computes items and leaves what belongs to each of their particles in an array of its
own; another one adds that up particle by particle, so that there are no atomic operations, and the
same sums in the same order every time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from mdgraft.kernels.device import programs
from mdgraft.kernels.device.writer import Name, TextEmitter, Writer
from mdgraft.kernels.fused.graph import Series, topological
from mdgraft.kernels.fused.pair_formulas import Task
from mdgraft.kernels.fused.tuples import ORIGIN, TupleFormula, tuple_formulas

#: Items, or particles, of a program.
BLOCK = 64
_WARPS = 2


@dataclasses.dataclass(frozen=True)
class ItemProgram:
    """A program and the layout of what it reads and writes.

    Attributes
    ----------
    text
        Its source. ``particles`` ``(P, items)`` int32; ``numbers`` ``(F, per)`` shared quantities,
        their directions if the program is of second order, constants, then for each series a
        factor, a shift and coefficients; ``box`` ``(F, 9)``, ``positions`` ``(F, N, 3)``, ``items``
        ``(n, items)``, ``common`` ``(m, N)`` quantities of particles and ``framed`` ``(F, m, N)``
        those that differ between frames. ``dbox`` to ``dparticle`` ``(F, m, N)``, framed ones
        included, are directions. ``of_items`` ``(F, n, items)``, ``parts`` ``(F, n_parts, P,
        items)``, and ``sums`` ``(F, blocks, n_sums)`` float64: the energy, unless the program is of
        second order, the derivative in the box, and those in shared quantities.
    n_parts
        What belongs to each particle of an item: the derivative in its position, if positions are
        asked for, then in its quantities.
    n_sums
        Length of sums.
    series
        Functions whose coefficients the numbers must hold, in this order.
    """

    text: str
    n_parts: int
    n_sums: int
    series: tuple[Series, ...]

    def start(self, n_frames: int, n_items: int, n_particles: int, *arrays: Any) -> None:
        """Start it for all items of all frames."""
        blocks = -(-n_items // BLOCK)
        function = programs.program("items_of", self.text)
        grid, sizes = (n_frames * blocks,), (n_items, n_particles, blocks)
        programs.start(function, grid, *arrays, *sizes, warps=_WARPS)


#: Arguments by name; pointers but for the last three.
ARGUMENTS = (
    *("particles", "numbers", "box", "positions", "items", "common", "framed"),
    *("dbox", "dpositions", "ditems", "dparticle", "of_items", "parts", "sums"),
    *("n_items", "n_particles", "n_blocks"),
)


@functools.lru_cache(maxsize=512)
def item_program(formula: TupleFormula, task: Task, double: bool, periodic: bool) -> ItemProgram:
    """The program for a formula in one precision."""
    return _ItemWriter(formula, task, double, periodic).written()


class _ItemWriter:
    def __init__(self, formula: TupleFormula, task: Task, double: bool, periodic: bool) -> None:
        self.formula, self.task, self.periodic = formula, task, periodic
        self.formulas = tuple_formulas(formula, task, framed_only=False)
        roots = self.formulas.roots
        found = (node.payload for node in topological(roots) if roots)
        self.series = tuple(dict.fromkeys(p for p in found if isinstance(p, Series)))
        self.writer = Writer(double=double)
        self.emitter = TextEmitter(self.writer, self._coefficients)

    def written(self) -> ItemProgram:
        writer, formula = self.writer, self.formula
        writer.line("program = tl.program_id(0).to(tl.int64)")
        writer.line("frame = program // n_blocks")
        writer.line(f"item = (program % n_blocks) * {BLOCK} + tl.arange(0, {BLOCK})")
        writer.line("valid = item < n_items")
        values = self._numbers()
        members = [
            writer.new(f"{self._load(f'particles + {p} * n_items + item')}.to(tl.int64)")
            for p in range(formula.n_particles)
        ]
        self._quantities(values, members)
        images = self._edges(values, members)
        results = iter(self.emitter.formulas(self.formulas.roots, values))
        totals = [] if self.formulas.energy is None else [next(results)]
        slopes = [next(results) for _ in self.formulas.edges]
        of_item = [next(results) for _ in self.formulas.item]
        of_particle = [next(results) for _ in self.formulas.particle]
        for k, name in enumerate(of_item):
            place = f"of_items + (frame * {len(of_item)} + {k}) * n_items + item"
            writer.line(f"tl.store({place}, {name}, mask=valid)")
        n_parts = self._parts(slopes, of_particle)
        if slopes:
            totals += self._box(images, slopes)
        totals += results
        for k, name in enumerate(totals):
            writer.line(f"every = tl.where(valid, {name}, 0.0).to(tl.float64)")
            writer.line(f"tl.store(sums + program * {len(totals)} + {k}, tl.sum(every, axis=0))")
        sizes = '["n_items", "n_particles", "n_blocks"]'
        head = f"@triton.jit(do_not_specialize={sizes})\ndef items_of("
        text = "\n".join([head + ", ".join(ARGUMENTS) + "):", *writer.lines, ""])
        return ItemProgram(text, n_parts, len(totals), self.series)

    def _load(self, place: str) -> str:
        return f"tl.load({place}, mask=valid, other=0)"

    def _numbers(self) -> dict[str, Name]:
        formula, writer = self.formula, self.writer
        names = list(formula.shared)
        if self.task.second:
            names += [f"d{name}" for name in formula.shared]
        names += formula.constants
        size = len(names) + sum(series.degree + 3 for series in self.series)
        writer.line(f"given = numbers + frame * {size}")
        self.tables: dict[Series, list[Name]] = {}
        place = len(names)
        for series in self.series:
            n = series.degree + 3
            self.tables[series] = [writer.loaded(f"given + {k}") for k in range(place, place + n)]
            place += n
        return {name: writer.loaded(f"given + {k}") for k, name in enumerate(names)}

    def _coefficients(self, series: Series) -> tuple[Sequence[Name], Name, Name]:
        factor, shift, *coefficients = self.tables[series]
        return coefficients, factor, shift

    def _quantities(self, values: dict[str, Name], members: Sequence[Name]) -> None:
        """Quantities of items and of their particles, and directions of both."""
        formula, writer = self.formula, self.writer
        n, second = len(formula.item), self.task.second
        for k, name in enumerate(formula.item):
            values[name] = writer.new(self._load(f"items + {k} * n_items + item"))
            if second:
                place = f"ditems + (frame * {n} + {k}) * n_items + item"
                values[f"d{name}"] = writer.new(self._load(place))
        framed = [name for name in formula.particle if name in formula.framed]
        common = [name for name in formula.particle if name not in formula.framed]
        for k, name in enumerate(formula.particle):
            if name in framed:
                row = f"framed + (frame * {len(framed)} + {framed.index(name)})"
            else:
                row = f"common + {common.index(name)}"
            turn = f"dparticle + (frame * {len(formula.particle)} + {k})"
            for p, member in enumerate(members):
                values[f"{name}_{p}"] = writer.new(self._load(f"{row} * n_particles + {member}"))
                if second:
                    place = f"{turn} * n_particles + {member}"
                    values[f"d{name}_{p}"] = writer.new(self._load(place))

    def _edges(self, values: dict[str, Name], members: Sequence[Name]) -> list[list[Name]]:
        """Vectors between particles; returns the numbers of boxes taken off them, by axis."""
        writer, images = self.writer, []
        arrays = [("positions", "")] + ([("dpositions", "d")] if self.task.second else [])
        for e, (start, end) in enumerate(self.formula.edges):
            vectors = []
            for array, _ in arrays:
                places = [
                    [
                        self._load(f"{array} + (frame * n_particles + {members[p]}) * 3 + {k}")
                        for k in range(3)
                    ]
                    for p in (end, start)
                    if p != ORIGIN
                ]
                ends = [[writer.new(x) for x in place] for place in places]
                vectors.append(
                    [writer.fsub(*pair) for pair in zip(*ends, strict=True)]
                    if start != ORIGIN
                    else ends[0]
                )
            images.append(self._nearest(vectors) if self.periodic and start != ORIGIN else [])
            for (_, prefix), vector in zip(arrays, vectors, strict=True):
                for axis, component in zip("xyz", vector, strict=True):
                    values[f"{prefix}{axis}{e}"] = component
        return images

    def _nearest(self, vectors: list[list[Name]]) -> list[Name]:
        """Turn a vector, and its direction, into that to the nearest image; numbers of boxes."""
        writer, images = self.writer, []
        for axis in (2, 1, 0):
            length = writer.loaded(f"box + frame * 9 + {4 * axis}")
            n = writer.new(f"tl.floor({vectors[0][axis]} / {length} + 0.5)")
            for array, vector in zip(("box", "dbox"), vectors, strict=False):
                for k in range(3):
                    entry = writer.loaded(f"{array} + frame * 9 + {3 * axis + k}")
                    vector[k] = writer.new(f"{vector[k]} - {n} * {entry}")
            images.append(n)
        return images[::-1]

    def _parts(self, slopes: Sequence[Name], of_particle: Sequence[Name]) -> int:
        """Leave what belongs to each particle; returns how much that is."""
        writer, formula = self.writer, self.formula
        n, width = len(formula.particle) if of_particle else 0, formula.n_particles
        first = 3 if slopes else 0
        for p in range(width):
            values: list[str] = []
            for k in range(first):
                ends = [
                    f"{sign} {slopes[3 * e + k]}"
                    for e, edge in enumerate(formula.edges)
                    for sign, q in (("-", edge[0]), ("+", edge[1]))
                    if q == p
                ]
                values.append(" ".join(ends).removeprefix("+ ") or "tl.zeros_like(item)")
            values += [of_particle[k * width + p] for k in range(n)]
            for k, value in enumerate(values):
                row = f"(frame * {first + n} + {k}) * {width} + {p}"
                writer.line(f"tl.store(parts + ({row}) * n_items + item, {value}, mask=valid)")
        return first + n

    def _box(self, images: Sequence[Sequence[Name]], slopes: Sequence[Name]) -> list[Name]:
        """The derivative in the box."""
        result = []
        for axis in range(3):
            for k in range(3):
                terms = [
                    f"{of_edge[axis]} * {slopes[3 * e + k]}"
                    for e, of_edge in enumerate(images)
                    if of_edge
                ]
                zero = self.writer.constant(0.0, self.writer.number)
                total = " + ".join(terms)
                result.append(self.writer.new(f"-({total})") if terms else zero)
        return result


# Sums by particle -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def gathering(n: int, double: bool) -> str:
    """The program that `gather` starts, for n numbers at a time."""
    writer = Writer(double=double)
    writer.line("program = tl.program_id(0).to(tl.int64)")
    writer.line("frame = program // n_blocks")
    writer.line(f"particle = (program % n_blocks) * {BLOCK} + tl.arange(0, {BLOCK})")
    writer.line("valid = particle < n_particles")
    writer.line("begin = tl.load(starts + particle, mask=valid, other=0)")
    writer.line("end = tl.load(starts + particle + 1, mask=valid, other=0)")
    for k in range(n):
        writer.line(f"sum{k} = tl.zeros([{BLOCK}], {writer.number})")
    with writer.block("for step in range(tl.max(end - begin, axis=0)):"):
        writer.line("there = begin + step < end")
        writer.line("entry = tl.load(entries + begin + step, mask=there, other=0)")
        for k in range(n):
            place = f"parts + (frame * {n} + {k}) * n_entries + entry"
            writer.line(f"sum{k} += tl.load({place}, mask=there, other=0)")
    for k in range(n):
        place = f"out + (frame * {n} + {k}) * n_particles + particle"
        writer.line(f"tl.store({place}, sum{k}, mask=valid)")
    sizes = '"n_particles", "n_entries", "n_blocks"'
    arguments = "starts, entries, parts, out, n_particles, n_entries, n_blocks"
    head = f"@triton.jit(do_not_specialize=[{sizes}])\ndef gathered({arguments}):"
    return "\n".join([head, *writer.lines, ""])


def gather(starts: Any, entries: Any, parts: Any, out: Any) -> None:
    """Add ``parts`` ``(F, n, entries)`` up to ``out`` ``(F, n, N)``.

    Those of particle i are ``entries[starts[i]:starts[i + 1]]``.
    """
    n_frames, n, n_particles = out.shape
    blocks = -(-n_particles // BLOCK)
    text = gathering(n, out.dtype.itemsize == 8)
    function = programs.program("gathered", text)
    sizes = (n_particles, len(entries), blocks)
    programs.start(
        function, (n_frames * blocks,), starts, entries, parts, out, *sizes, warps=_WARPS
    )
