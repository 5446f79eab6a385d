"""Energies of all pairs within a cutoff, with derivatives, by compiled loops over tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.fused.clusters import Exclusions, TileList, tile_list
from mdgraft.kernels.fused.frame_pass import Gathered, Layer, frame_pass
from mdgraft.kernels.fused.graph import Series
from mdgraft.kernels.fused.pair_formulas import PairFormula, Task
from mdgraft.kernels.fused.pairs_by_frame import FEWEST, LARGEST, pairs_by_frame
from mdgraft.kernels.fused.spreading import compiled
from mdgraft.kernels.fused.thinning import Kinds, thinned
from mdgraft.kernels.fused.tiles import Loop, compiled_loop
from mdgraft.kernels.fused.tuple_kernel import TupleKernel
from mdgraft.kernels.kernel import Inputs, PerFrame
from mdgraft.kernels.pairs import require_room

#: Lists are made for a cutoff that is longer by this fraction.
SKIN = 0.1
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
    """A kernel, see `mdgraft.kernels.kernel.Kernel`, of one pair formula.

    Its inputs are positions, box, the particles' quantities ``(N,)``, shared quantities ``()`` and
    tables ``(entries,)``, in the formula's order.

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
    kinds
        Which particles may interact at all; None if all may.
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
        kinds: Kinds | None = None,
    ) -> None:
        self.formula = formula
        self.framed = tuple(
            2 + k for k, name in enumerate(formula.particle) if name in formula.framed
        )
        self.cutoff = cutoff
        self.exclusions = exclusions
        self.constants = dict(constants)
        self.reference = reference
        self._kinds = kinds
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

    def _by_frame(self, inputs: Inputs) -> TupleKernel | None:
        """Another kernel, for many frames of few particles."""
        n_frames, n_particles = inputs[0].shape[:2]
        if self.formula.tables:
            return None
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
        first = 2 + len(self.formula.particle)
        end = first + len(self.formula.shared)
        return Task(
            positions=wanted[0] or wanted[1],
            particle=any(wanted[2:first]),
            shared=any(wanted[first:end]),
            tables=any(wanted[end:]),
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
        positions, box = inputs[:2]
        n_frames, n_particles = positions.shape[:2]
        m, periodic = len(self.formula.particle), box.shape[1] == 3
        dtype = positions.dtype
        loop = compiled_loop(self.formula, task, dtype == torch.float64)
        sums = np.zeros((n_frames, loop.n_sums))
        slopes = torch.empty(n_frames, n_particles if task.positions else 0, 3, dtype=dtype)
        strains = torch.zeros(n_frames, 3 if periodic else 0, 3, dtype=dtype)
        particle = torch.empty(n_frames, m if task.particle else 0, n_particles, dtype=dtype)
        own = self._quantities(inputs[2 : 2 + m], n_frames, n_particles, dtype)
        moving = None
        if directions is not None:
            pairs = zip(directions[2 : 2 + m], inputs[2 : 2 + m], strict=True)
            moves = [torch.zeros_like(t) if d is None else d for d, t in pairs]
            moving = self._quantities(moves, n_frames, n_particles, dtype)
        places, cells = positions.double().numpy(), box.double().numpy()
        kind = np.float64 if dtype == torch.float64 else np.float32
        numbers: np.ndarray | None = None
        for f in range(n_frames):
            cell = cells[f] if periodic else None
            if cell is not None:
                require_room(cell, self.cutoff)
            here = np.ascontiguousarray(places[f])
            found = Gathered(slopes=slopes[f].numpy(), particle=particle[f].numpy())
            if n_particles < 2 or not np.isfinite(here).all():
                # A lost particle is close to nobody, which must not look like a good energy.
                empty = 0.0 if np.isfinite(here).all() else np.nan
                for array in (sums[f], found.slopes, found.particle, strains[f].numpy()):
                    array.fill(empty)
                continue
            tiles = self._tiles(here, cell, loop.lanes, several=n_frames > 1)
            shape = np.zeros((3, 3)) if cell is None else cell
            layers = [Layer(positions=here, box=shape, particle=own[f])]
            if directions is not None and moving is not None:
                step, turn = directions[:2]
                layers.append(
                    Layer(
                        positions=np.zeros_like(here) if step is None else _double(step[f]),
                        box=np.zeros((3, 3)) if turn is None or cell is None else _double(turn[f]),
                        particle=moving[f],
                    )
                )
            if numbers is None or directions is not None:
                numbers = self._numbers(loop, inputs, directions, f).astype(kind, copy=False)
            sums[f], change = frame_pass(loop, tiles, layers, numbers, found)
            if periodic:
                strains[f] = torch.from_numpy(change)
        energies = positions.new_zeros(n_frames) if task.second else torch.from_numpy(sums[:, 0])
        n_shared = len(self.formula.shared)
        rest = torch.from_numpy(sums[:, 0 if task.second else 1 :]).to(dtype)
        sizes = [size for _, size in self.formula.tables]
        available: PerFrame = [slopes, strains]
        available += [particle[:, k] for k in range(m)] if task.particle else [None] * m
        available += rest[:, :n_shared].unbind(-1) if task.shared else [None] * n_shared
        entries = rest[:, n_shared if task.shared else 0 :]
        available += torch.split(entries, sizes, -1) if task.tables else [None] * len(sizes)
        results = [a if on else None for a, on in zip(available, wanted, strict=False)]
        return energies.to(dtype), results

    def _quantities(
        self, tensors: Sequence[Tensor], n_frames: int, n_particles: int, dtype: torch.dtype
    ) -> Sequence[np.ndarray]:
        """Quantities of particles ``(m, N)`` of each frame."""
        if not tensors:
            return [np.zeros((0, n_particles), dtype=np.float32)] * n_frames
        if not any(t.ndim > 1 for t in tensors):
            return [torch.stack([t.to(dtype) for t in tensors]).numpy()] * n_frames
        spread = [t.to(dtype).expand(n_frames, n_particles) for t in tensors]
        result: np.ndarray = torch.stack(spread, dim=1).numpy()
        return list(result)

    def _numbers(
        self,
        loop: Loop,
        inputs: Sequence[Tensor],
        directions: Sequence[Tensor | None] | None,
        f: int,
    ) -> np.ndarray:
        """What all pairs share, in the order of the loop; without directions, in all frames."""
        first = 2 + len(self.formula.particle)
        end = first + len(self.formula.shared)
        numbers = [self.cutoff**2, *(float(s) for s in inputs[first:end])]
        if directions is not None:
            numbers += [0.0 if d is None else float(d[f]) for d in directions[first:end]]
        numbers += [self.constants[name] for name in self.formula.constants]
        tables = []
        if loop.series:
            assert self._table is not None
            tables = [self._table(series) for series in loop.series]
        tables += [table.resolve_neg().numpy() for table in inputs[end:]]
        for (_, size), move in zip(
            self.formula.tables, () if directions is None else directions[end:], strict=False
        ):
            tables.append(np.zeros(size) if move is None else move[f].resolve_neg().numpy())
        return np.concatenate([np.array(numbers, dtype=np.float64), *tables])

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
        if self._kinds is not None:
            tiles = thinned(tiles, self._kinds)
        self._known[lanes] = _Known(
            tiles, positions.copy(), None if box is None else box.copy(), skin
        )
        return tiles


def _double(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.double().contiguous().numpy()
    return array


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


@compiled
def _largest_move(a: np.ndarray, b: np.ndarray) -> float:
    largest = 0.0
    for i in range(len(a)):
        square = 0.0
        for k in range(3):
            square += (a[i, k] - b[i, k]) ** 2
        largest = max(largest, square)
    return largest
