"""Energies of all pairs within a cutoff, with derivatives, on the device of the positions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.device.clusters import SIZE, ClusterList, cluster_list, padded, taken
from mdgraft.kernels.device.numbers import (
    Constants,
    Table,
    outer_sum,
    shared_numbers,
    some_frames,
)
from mdgraft.kernels.device.pair_program import PairProgram, pair_program
from mdgraft.kernels.device.recording import NotRecordableError, recorder
from mdgraft.kernels.fused.clusters import Exclusions
from mdgraft.kernels.fused.pair_formulas import PairFormula, Task
from mdgraft.kernels.fused.pair_kernel import SKIN
from mdgraft.kernels.fused.thinning import Kinds
from mdgraft.kernels.kernel import Inputs, PerFrame
from mdgraft.kernels.pairs import require_room

#: How far particles may go before clusters without a cutoff are made anew [nm], twice.
_FAR = 2.0
#: Clusters of the frames that are worked on at the same time; bounds memory.
_ROWS = 1 << 16


@dataclasses.dataclass
class _Known:
    """A list, the configurations it was made for, and how to make another one."""

    clusters: ClusterList
    positions: Tensor
    box: Tensor | None
    skin: float
    make: Callable[[Tensor, Tensor | None, float], ClusterList]
    #: Whether a newer list was too long for its memory.
    full: bool = False

    def holds(self, positions: Tensor, box: Tensor | None) -> Tensor:
        """Whether every pair within the cutoff is still in the list ``()``."""
        change = positions - self.positions
        # Not so for what is not a number.
        near = (change * change).sum(dim=-1).amax() <= (0.5 * self.skin) ** 2
        return near if box is None or self.box is None else near & (box == self.box).all()

    def renew(self, positions: Tensor, box: Tensor | None) -> bool:
        """Bring it up to date in place; false if there is no room."""
        if not self.clusters.refill(self.make(positions, box, self.skin)):
            self.full = True
            return False
        self.positions.copy_(positions)
        if box is not None and self.box is not None:
            self.box.copy_(box)
        return True

    def with_room(self) -> _Known:
        """A copy that has room for longer lists, so that it can be renewed in place."""
        box = None if self.box is None else self.box.clone()
        return dataclasses.replace(
            self, clusters=self.clusters.roomy(), positions=self.positions.clone(), box=box
        )

    def fits(self, positions: Tensor, box: Tensor | None, dtype: torch.dtype) -> bool:
        """Whether it is of as many particles in float64, in the same place and precision."""
        return (
            self.positions.shape == positions.shape
            and self.positions.device == positions.device
            and self.clusters.offsets.dtype == dtype
            and (self.box is None) == (box is None)
        )


class DevicePairKernel:
    """A kernel, see `mdgraft.kernels.kernel.Kernel`, of one pair formula.

    Inputs and parameters are those of `mdgraft.kernels.fused.pair_kernel.PairKernel`. Lists hold
    particles of all kinds, whether they interact or not.
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
        self.reference = reference
        self._constants = Constants([constants[name] for name in formula.constants], table)
        counts = np.diff(exclusions.starts)
        pairs = np.stack([np.repeat(np.arange(len(counts)), counts), exclusions.partners])
        #: Each once, as an array: a tensor made inside a torch.func transform must not outlive it.
        self._exclusions = pairs.T[pairs[0] < pairs[1]]
        self._known: _Known | None = None
        #: What recordings read; nobody else does, since it is renewed in place.
        self._recorded: _Known | None = None

    @property
    def label(self) -> tuple[Hashable, ...]:
        """Equal for kernels that run the same programs."""
        return "pairs", self.formula

    # Kernel -----------------------------------------------------------------------------------

    def energies(self, inputs: Inputs) -> Tensor:
        """Energies ``(F,)``."""
        return self._run(inputs, Task(), None, [False] * len(inputs))[0]

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor, PerFrame]:
        """Energies, and derivatives of each frame's energy."""
        return self._run(inputs, self._task(wanted, second=False), None, wanted)

    def products(
        self, inputs: Inputs, directions: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> PerFrame:
        """Second derivatives times directions."""
        return self._run(inputs, self._task(wanted, second=True), directions, wanted)[1]

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

    # Frames -----------------------------------------------------------------------------------

    def _run(
        self,
        inputs: Inputs,
        task: Task,
        directions: Sequence[Tensor | None] | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, PerFrame]:
        """As many frames at a time as memory is meant for."""
        n_frames, n_particles = inputs[0].shape[:2]
        if n_frames == 0 or n_particles < 2:
            return self._nothing(inputs, wanted)
        size = max(1, _ROWS // -(-n_particles // SIZE))
        if n_frames <= size:
            return self._frames(inputs, task, directions, wanted)
        parts = []
        for start in range(0, n_frames, size):
            some = slice(start, start + size)
            own = [t[some] if k < 2 or k in self.framed else t for k, t in enumerate(inputs)]
            moves = some_frames(directions, some)
            parts.append(self._frames(own, task, moves, wanted))
        energies = torch.cat([part[0] for part in parts])
        columns = zip(*(part[1] for part in parts), strict=True)
        return energies, [
            None if column[0] is None else torch.cat([t for t in column if t is not None])
            for column in columns
        ]

    def _nothing(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor, PerFrame]:
        """Of no pairs at all."""
        n_frames = inputs[0].shape[0]
        lost = 0.0 * inputs[0].sum(dim=(1, 2))
        return lost, [
            t.new_zeros(t.shape if k < 2 or k in self.framed else (n_frames, *t.shape))
            + lost.reshape(-1, *(1,) * (t.ndim - (k < 2 or k in self.framed)))
            if on
            else None
            for k, (t, on) in enumerate(zip(inputs, wanted, strict=True))
        ]

    def _frames(
        self,
        inputs: Inputs,
        task: Task,
        directions: Sequence[Tensor | None] | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, PerFrame]:
        positions, box = inputs[:2]
        n_frames = positions.shape[0]
        m, periodic = len(self.formula.particle), box.shape[1] == 3
        program = pair_program(self.formula, task, positions.dtype == torch.float64)
        clusters = self._clusters(positions, box if periodic else None)
        n_rows = n_frames * clusters.n_clusters
        data = [
            self._positions(positions, clusters.base, clusters, math.nan),
            self._quantities(inputs[2 : 2 + m], clusters, positions),
        ]
        turns = positions.new_zeros(1)
        if directions is not None:
            step, turn, *moves = directions
            step = torch.zeros_like(positions) if step is None else step
            turn = torch.zeros_like(box) if turn is None else turn
            base = (clusters.wraps @ turn.double()) if periodic else torch.zeros_like(step).double()
            turns = (clusters.images @ turn.double()).to(positions.dtype) if periodic else turns
            moved = [
                torch.zeros_like(t) if d is None else d
                for t, d in zip(inputs[2 : 2 + m], moves[:m], strict=True)
            ]
            data += [
                self._positions(step, taken(padded(base, 0.0), clusters.order), clusters, 0.0),
                self._quantities(moved, clusters, positions),
            ]
        if not periodic:
            turns = positions.new_zeros(n_frames, 1, 3)
        out = positions.new_empty(n_rows, program.n_outputs, SIZE)
        sums = positions.new_zeros(n_rows, program.n_sums + 9, dtype=torch.float64)
        totals = positions.new_zeros(n_frames, program.n_entries, dtype=torch.float64)
        columns = torch.cat(data, dim=-1).reshape(n_rows, SIZE, -1)
        program.start(
            n_rows,
            *(clusters.rows, clusters.segments, clusters.image, clusters.images),
            *(clusters.columns, clusters.offsets, clusters.mask, clusters.masks),
            *(self._numbers(program, inputs, directions), turns.contiguous()),
            *(columns.transpose(1, 2).contiguous(), out, sums),
            totals if program.n_entries else sums,
            # Directions of shared quantities differ between frames, and so do totals.
            clusters.n_clusters if task.second or self.formula.tables else n_rows,
            len(clusters.images),
        )
        return self._collected(program, task, clusters, out, sums, totals, inputs, wanted)

    def _collected(
        self,
        program: PairProgram,
        task: Task,
        clusters: ClusterList,
        out: Tensor,
        sums: Tensor,
        totals: Tensor,
        inputs: Inputs,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, PerFrame]:
        """What belongs to particles in their own order, and sums by frame."""
        positions, m = inputs[0], len(self.formula.particle)
        n_frames = positions.shape[0]
        # Each pair was counted twice.
        total = 0.5 * sums.reshape(n_frames, clusters.n_clusters, -1).sum(dim=1)
        n = program.n_sums
        sorted_ = out.transpose(1, 2).reshape(n_frames, clusters.order.shape[1], program.n_outputs)
        own = taken(sorted_, clusters.places)
        # What is recorded is replayed for finite numbers only.
        if recorder(positions) is None:
            # A lost particle is close to nobody, which must not look like a good energy.
            lost = (0.0 * positions).sum(dim=(1, 2))
            own, total = own + lost[:, None, None], total + lost.double()[:, None]
        available: PerFrame = [None] * len(inputs)
        if task.positions:
            available[0] = slopes = own[..., :3]
            if inputs[1].shape[1]:
                box = total[:, n:].reshape(-1, 3, 3)
                box = box - outer_sum(clusters.wraps, slopes.double())
                available[1] = box.to(positions.dtype)
            else:
                available[1] = torch.zeros_like(inputs[1])
        if task.particle:
            first = 3 if task.positions else 0
            available[2 : 2 + m] = own[..., first:].unbind(-1)
        # A copy, since torch wants tangents of the same layout.
        energies = total[:, 0].to(positions.dtype, copy=True)
        if task.shared:
            shared = total[:, 0 if task.second else 1 : n].to(positions.dtype)
            available[2 + m : 2 + m + shared.shape[1]] = shared.unbind(-1)
        if task.tables:
            sizes = [size for _, size in self.formula.tables]
            entries = (0.5 * totals).to(positions.dtype)
            available[len(inputs) - len(sizes) :] = torch.split(entries, sizes, -1)
        return energies, [a if on else None for a, on in zip(available, wanted, strict=True)]

    # What programs read -----------------------------------------------------------------------

    def _positions(
        self, positions: Tensor, base: Tensor, clusters: ClusterList, nowhere: float
    ) -> Tensor:
        """Vectors less a base, in the order of clusters ``(F, C * SIZE, 3)``."""
        there = taken(padded(positions.double(), nowhere), clusters.order)
        return (there - base).to(positions.dtype)

    def _quantities(self, tensors: Sequence[Tensor], clusters: ClusterList, like: Tensor) -> Tensor:
        """Quantities of particles in the order of clusters ``(F, C * SIZE, m)``."""
        n_frames, n_particles = like.shape[:2]
        if not tensors:
            return like.new_zeros(*clusters.order.shape, 0)
        if any(t.ndim > 1 for t in tensors):
            tensors = [t.expand(n_frames, n_particles) for t in tensors]
            return taken(padded(torch.stack(tensors, dim=-1).to(like.dtype), 0.0), clusters.order)
        common = torch.stack(list(tensors), dim=-1).to(like.dtype)
        return padded(common[None], 0.0)[0, clusters.order]

    def _numbers(
        self, program: PairProgram, inputs: Inputs, directions: Sequence[Tensor | None] | None
    ) -> Tensor:
        """What all pairs share ``(1 or F, per)``, in the order of the program."""
        positions, tables = inputs[0], self.formula.tables
        first = 2 + len(self.formula.particle)
        end = first + len(self.formula.shared)
        n = positions.shape[0] if tables or directions is not None else 1
        fixed = self._constants.numbers(program.series, positions)
        numbers = shared_numbers(
            inputs[first:end], None if directions is None else directions[first:end], fixed, n
        )
        parts = [torch.nn.functional.pad(numbers, (1, 0), value=self.cutoff**2)]
        parts += [table.to(positions).expand(n, -1) for table in inputs[end:]]
        for (_, size), move in zip(
            tables, () if directions is None else directions[end:], strict=False
        ):
            parts.append(positions.new_zeros(n, size) if move is None else move.to(positions))
        return torch.cat(parts, dim=1) if tables else parts[0]

    # Lists ------------------------------------------------------------------------------------

    def _clusters(self, positions: Tensor, box: Tensor | None) -> ClusterList:
        """The list, made anew when particles have moved by half its skin or the box changed."""
        here, dtype = positions.double(), positions.dtype
        cell = None if box is None else box.double()
        known, moved = self._known, math.inf
        if known is not None and not known.fits(here, cell, dtype):
            known = None
        recording = recorder(positions)
        if recording is not None:
            lists = self._recorded
            if lists is None or lists.full or not lists.fits(here, cell, dtype):
                if known is None or not known.skin:
                    raise NotRecordableError("there is no list yet")
                if here.is_cuda and torch.cuda.is_current_stream_capturing():
                    # It was there a moment ago; its memory must not be that of the recording.
                    raise NotRecordableError("another thread has used up the list")
                self._recorded = lists = known.with_room()
            recording.require(lists.holds(here, cell))
            recording.depend(lists, here, cell)
            return lists.clusters
        # Where a list was made decides how sums are rounded.
        exact = torch.are_deterministic_algorithms_enabled()
        if known is not None:
            moved = _moved(known, here, cell)
            if moved == known.skin == 0 or (2 * moved <= known.skin and not exact):
                return known.clusters
        # Without a cutoff, so far that places within clusters are still short numbers.
        skin = _FAR if math.isinf(self.cutoff) else 0.0
        # A skin pays if it lasts: not for frames that have little to do with each other.
        lasts = self._known is None or 6 * moved <= SKIN * self.cutoff
        if lasts and not (len(here) > 1 or exact or math.isinf(self.cutoff)):
            skin = SKIN * self.cutoff
        make = functools.partial(self._list, dtype)
        clusters = make(here, cell, skin)
        box = None if cell is None else cell.clone()
        self._known = _Known(clusters, here.clone(), box, skin, make)
        return clusters

    def _list(
        self, dtype: torch.dtype, positions: Tensor, box: Tensor | None, skin: float
    ) -> ClusterList:
        """A new list, with offsets of this type."""
        if box is not None:
            cells = box.cpu().numpy()
            diagonals = cells.diagonal(axis1=1, axis2=2).min(axis=1)
            require_room(cells[diagonals.argmin()], self.cutoff)
        exclusions = torch.as_tensor(self._exclusions, device=positions.device)
        return cluster_list(positions, box, self.cutoff + skin, exclusions, dtype)


def _moved(known: _Known, positions: Tensor, box: Tensor | None) -> float:
    """How far a particle has moved at most; infinitely far if the box has changed."""
    change = positions - known.positions
    largest = (change * change).sum(dim=-1).amax().sqrt()
    if box is not None and known.box is not None:
        largest = torch.where((box == known.box).all(), largest, math.inf)
    return float(largest)
