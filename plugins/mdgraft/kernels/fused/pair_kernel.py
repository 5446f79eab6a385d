"""Energies of all pairs within a cutoff, with derivatives, by compiled loops over tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.derivatives import Inputs, PerFrame
from mdgraft.kernels.fused.clusters import Exclusions, TileList, tile_list
from mdgraft.kernels.fused.graph import Series
from mdgraft.kernels.fused.pairs_by_frame import FEWEST, LARGEST, pairs_by_frame
from mdgraft.kernels.fused.spreading import compiled
from mdgraft.kernels.fused.threads import run_chunks
from mdgraft.kernels.fused.tiles import Loop, PairFormula, Task, compiled_loop
from mdgraft.kernels.fused.tuple_kernel import TupleKernel
from mdgraft.kernels.pairs import require_room

#: Lists are made for a cutoff that is longer by this fraction.
SKIN = 0.1
#: Fewer tiles than this are not worth a thread of their own.
_TILES_PER_THREAD = 2000

#: ``(series, numbers by name) -> (factor, shift, coefficients...)``.
Table = Callable[[Series], np.ndarray]


@dataclasses.dataclass
class _Known:
    """A list and the configuration it was made for."""

    tiles: TileList
    positions: np.ndarray
    box: np.ndarray | None
    skin: float


class PairKernel:
    """A kernel, see `mdgraft.kernels.derivatives.Kernel`, of one pair formula.

    Its inputs are positions, box, the particles' quantities ``(N,)`` and shared quantities ``()``,
    in the formula's order.

    Parameters
    ----------
    formula
        The energy of a pair.
    cutoff
        [nm]; infinite in an open system without one.
    exclusions
        Pairs that do not interact.
    constants
        The formula's constants by name.
    table
        Coefficients of the series that the formula uses.
    reference
        A plain torch form of the same energy.
    """

    fused = True

    def __init__(
        self,
        formula: PairFormula,
        *,
        cutoff: float,
        exclusions: Exclusions,
        constants: Mapping[str, float],
        table: Table | None = None,
        reference: Callable[..., Tensor] | None,
    ) -> None:
        self.formula = formula
        self.framed = tuple(
            2 + k for k, name in enumerate(formula.particle) if name in formula.framed
        )
        self.cutoff = cutoff
        self.exclusions = exclusions
        self.constants = dict(constants)
        self.reference = reference
        self._table = table
        self._known: dict[int, _Known] = {}
        self._few: dict[bool, TupleKernel] = {}

    # Kernel -----------------------------------------------------------------------------------

    def energies(self, inputs: Inputs) -> Tensor:
        """Energies ``(F,)``."""
        few = self._by_frame(inputs)
        if few is not None:
            return few.energies(inputs)
        return self._run(inputs, Task(), None)[0]

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor, PerFrame]:
        """Energies, and derivatives of each frame's energy."""
        few = self._by_frame(inputs)
        if few is not None:
            return few.gradients(inputs, wanted)
        return self._run(inputs, self._task(wanted, second=False), None, wanted)

    def products(
        self, inputs: Inputs, directions: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> PerFrame:
        """Second derivatives times directions."""
        few = self._by_frame(inputs)
        if few is not None:
            return few.products(inputs, directions, wanted)
        return self._run(inputs, self._task(wanted, second=True), directions, wanted)[1]

    def _tables(self, loop: Loop) -> list[np.ndarray]:
        if not loop.series:
            return []
        assert self._table is not None
        return [self._table(series) for series in loop.series]

    def _by_frame(self, inputs: Inputs) -> TupleKernel | None:
        """Another kernel, for many frames of few particles."""
        n_frames, n_particles = inputs[0].shape[:2]
        if n_frames < FEWEST or not 2 <= n_particles <= LARGEST:
            return None
        periodic = inputs[1].shape[1] == 3
        if periodic:
            for cell in inputs[1].double().numpy():
                require_room(cell, self.cutoff)
        if periodic not in self._few:
            starts, partners = self.exclusions.starts, self.exclusions.partners
            self._few[periodic] = pairs_by_frame(
                self.formula,
                n_particles=n_particles,
                excluded={
                    (i, int(j))
                    for i in range(n_particles)
                    for j in partners[starts[i] : starts[i + 1]]
                },
                cutoff=self.cutoff,
                constants=self.constants,
                table=self._table,
                periodic=periodic,
                reference=self.reference,
            )
        return self._few[periodic]

    def _task(self, wanted: Sequence[bool], *, second: bool) -> Task:
        n = len(self.formula.particle)
        return Task(
            positions=wanted[0] or wanted[1],
            particle=any(wanted[2 : 2 + n]),
            shared=any(wanted[2 + n :]),
            second=second,
        )

    # One frame after the other ----------------------------------------------------------------

    def _run(
        self,
        inputs: Inputs,
        task: Task,
        directions: Sequence[Tensor | None] | None,
        wanted: Sequence[bool] = (),
    ) -> tuple[Tensor, PerFrame]:
        positions, box, *parameters = inputs
        n_frames, n_particles = positions.shape[:2]
        n_particle = len(self.formula.particle)
        energies = positions.new_zeros(n_frames)
        results: PerFrame = (
            [
                positions.new_zeros(
                    n_frames, *(t.shape[1:] if k < 2 or k in self.framed else t.shape)
                )
                if on
                else None
                for k, (t, on) in enumerate(zip(inputs, wanted, strict=True))
            ]
            if wanted
            else []
        )
        if n_particles < 2 or n_frames == 0:
            return energies, results
        dtype = positions.dtype if positions.dtype == torch.float64 else torch.float32
        loop = compiled_loop(self.formula, task, dtype == torch.float64)
        own = [_array(p, dtype) for p in parameters[:n_particle]]
        shared = [float(p) for p in parameters[n_particle:]]
        periodic = box.shape[1] == 3
        places = positions.detach().numpy()
        cells = box.detach().double().numpy()
        for f in range(n_frames):
            cell = cells[f] if periodic else None
            if cell is not None:
                require_room(cell, self.cutoff)
            here = np.ascontiguousarray(places[f], dtype=np.float64)
            if not np.isfinite(here).all():
                # A lost particle is close to nobody, which must not look like a good energy.
                for result in (energies, *results):
                    if result is not None:
                        result[f] = torch.nan
                continue
            tiles = self._tiles(here, cell, loop.lanes, several=n_frames > 1)
            moves = None
            if directions is not None:
                moves = [None if d is None else d[f].detach() for d in directions]
            mine = [q[f] if 2 + k in self.framed else q for k, q in enumerate(own)]
            energy, slopes, change, particle, common = self._frame(
                loop, task, tiles, here, cell, mine, shared, moves, dtype
            )
            if not task.second:
                energies[f] = energy
            if not wanted:
                continue
            for k, (result, on) in enumerate(zip(results, wanted, strict=True)):
                if result is None or not on or result.numel() == 0:
                    continue
                if k == 0:
                    result[f] = torch.from_numpy(slopes)
                elif k == 1:
                    result[f] = torch.from_numpy(change)
                elif k < 2 + n_particle:
                    result[f] = torch.from_numpy(particle[:, k - 2])
                else:
                    result[f] = float(common[k - 2 - n_particle])
        return energies, results

    def _tiles(
        self, positions: np.ndarray, box: np.ndarray | None, lanes: int, *, several: bool
    ) -> TileList:
        known = self._known.get(lanes)
        moved = np.inf
        # Where a list was made decides how sums are rounded.
        exact = torch.are_deterministic_algorithms_enabled()
        if known is not None and len(known.positions) == len(positions):
            if self.cutoff == np.inf and not exact:
                return known.tiles
            if _same(known.box, box):
                moved = float(_largest_move(positions, known.positions)) ** 0.5
                # Half a skin each; exactly the cutoff may be within.
                if moved == known.skin == 0 or (2 * moved <= known.skin and not exact):
                    return known.tiles
        skin = 0.0
        # A skin pays if it lasts: not for frames that have little to do with each other.
        if (
            not (several or exact)
            and self.cutoff < np.inf
            and (known is None or 6 * moved <= SKIN * self.cutoff)
        ):
            skin = SKIN * self.cutoff
        tiles = tile_list(
            positions,
            box,
            self.cutoff + skin,
            self.exclusions,
            lanes,
            n_threads=torch.get_num_threads(),
        )
        self._known[lanes] = _Known(
            tiles, positions.copy(), None if box is None else box.copy(), skin
        )
        return tiles

    def _frame(
        self,
        loop: Loop,
        task: Task,
        tiles: TileList,
        positions: np.ndarray,
        box: np.ndarray | None,
        own: Sequence[np.ndarray],
        shared: Sequence[float],
        moves: Sequence[Tensor | None] | None,
        dtype: torch.dtype,
    ) -> tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Energy, slopes, derivative in the box, in the particles' and in shared quantities."""
        n, lanes = len(positions), loop.lanes
        cell = np.zeros((3, 3)) if box is None else box
        columns = [positions, cell, *own]
        numbers: list[float] = [self.cutoff**2, *shared]
        shifts = tiles.images @ cell
        n_own = len(own)
        turn = np.zeros((3, 3))
        if task.second:
            assert moves is not None
            change = np.zeros((n, 3)) if moves[0] is None else moves[0].double().numpy()
            if moves[1] is not None and box is not None:
                turn = moves[1].double().numpy()
            more = [
                np.zeros_like(a) if d is None else _array(d, dtype)
                for a, d in zip(own, moves[2 : 2 + n_own], strict=True)
            ]
            numbers += [0.0 if d is None else float(d) for d in moves[2 + n_own :]]
            shifts = np.concatenate([shifts, tiles.images @ turn], axis=1)
        numbers += [self.constants[name] for name in self.formula.constants]
        table = np.concatenate([np.array(numbers), *self._tables(loop)])
        data = torch.empty(tiles.n_clusters, loop.n_inputs, lanes, dtype=dtype).numpy()
        _fill_positions(data, 0, tiles.order, np.ascontiguousarray(columns[0]), tiles.wraps, cell)
        for k, quantity in enumerate(own):
            _fill(data, 3 + k, tiles.order, quantity)
        if task.second:
            start = 3 + n_own
            _fill_positions(
                data, start, tiles.order, np.ascontiguousarray(change), tiles.wraps, turn
            )
            for k, quantity in enumerate(more):
                _fill(data, start + 3 + k, tiles.order, quantity)
        n_threads = max(1, min(torch.get_num_threads(), len(tiles.tiles) // _TILES_PER_THREAD))
        bounds = _even_rows(tiles.rows, n_threads)
        out = torch.zeros(n_threads, tiles.n_clusters, loop.n_outputs, lanes, dtype=dtype).numpy()
        n_shifts = len(tiles.images)
        sums = np.zeros((n_threads, loop.n_sums + 3 * n_shifts))
        kind = data.dtype
        table, moved = table.astype(kind), np.ascontiguousarray(shifts, dtype=kind)

        def work(k: int) -> None:
            loop.function(
                int(bounds[k]),
                int(bounds[k + 1]),
                tiles.rows.ctypes.data,
                tiles.tiles.ctypes.data,
                tiles.masks.ctypes.data,
                table.ctypes.data,
                moved.ctypes.data,
                data.ctypes.data,
                out[k].ctypes.data,
                sums[k].ctypes.data,
            )

        run_chunks(work, n_threads)
        total = sums.sum(axis=0)
        start = 0 if task.second else 1
        collected = _collect(out, tiles.order, n)
        slopes = np.ascontiguousarray(collected[:, :3]) if task.positions else collected
        change_of_box = np.zeros((3, 3))
        if task.positions and box is not None:
            of_shifts = total[loop.n_sums :].reshape(n_shifts, 3)
            change_of_box = tiles.images.T @ of_shifts - tiles.wraps.T @ slopes
        particle = collected[:, 3 if task.positions else 0 :]
        energy = 0.0 if task.second else float(total[0])
        return energy, slopes, change_of_box, particle, total[start : loop.n_sums]


def _array(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    array: np.ndarray = tensor.detach().to(dtype).contiguous().numpy()
    return array


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


def _even_rows(rows: np.ndarray, n: int) -> np.ndarray:
    """Where to cut rows so that each part has about as many tiles."""
    ends = rows[:, 4]
    last = ends[-1] if len(ends) else 0
    cuts = np.searchsorted(ends, last * np.arange(1, n) / n)
    return np.concatenate([[0], cuts, [len(rows)]])


@compiled
def _largest_move(a: np.ndarray, b: np.ndarray) -> float:
    largest = 0.0
    for i in range(len(a)):
        square = 0.0
        for k in range(3):
            square += (a[i, k] - b[i, k]) ** 2
        largest = max(largest, square)
    return largest


@compiled
def _fill_positions(
    data: np.ndarray,
    row: int,
    order: np.ndarray,
    positions: np.ndarray,
    wraps: np.ndarray,
    cell: np.ndarray,
) -> None:
    lanes = data.shape[2]
    for j in range(len(order)):
        i = order[j]
        c, lane = j // lanes, j % lanes
        for k in range(3):
            value = 0.0
            if i >= 0:
                value = positions[i, k]
                for m in range(3):
                    value -= wraps[i, m] * cell[m, k]
            data[c, row + k, lane] = value


@compiled
def _fill(data: np.ndarray, row: int, order: np.ndarray, quantity: np.ndarray) -> None:
    lanes = data.shape[2]
    for j in range(len(order)):
        i = order[j]
        data[j // lanes, row, j % lanes] = quantity[i] if i >= 0 else 0


@compiled
def _collect(out: np.ndarray, order: np.ndarray, n: int) -> np.ndarray:
    """Sum over threads, in the order of particles, ``(n, n_outputs)`` float64."""
    n_outputs, lanes = out.shape[2], out.shape[3]
    result = np.zeros((n, n_outputs))
    for j in range(len(order)):
        i = order[j]
        if i >= 0:
            for thread in range(out.shape[0]):
                for k in range(n_outputs):
                    result[i, k] += out[thread, j // lanes, k, j % lanes]
    return result
