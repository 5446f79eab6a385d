"""Energies of lists of items, with derivatives, on the device of the positions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.device.item_program import BLOCK, ItemProgram, gather, item_program
from mdgraft.kernels.device.numbers import Constants, Table, shared_numbers, some_frames
from mdgraft.kernels.fused.pair_formulas import Task
from mdgraft.kernels.fused.tuples import TupleFormula
from mdgraft.kernels.kernel import Inputs, PerFrame

#: Numbers that items leave for their particles at the same time; bounds memory.
_NUMBERS = 1 << 26


class DeviceItemKernel:
    """A kernel, see `mdgraft.kernels.kernel.Kernel`, of a list of items.

    Inputs and parameters are those of `mdgraft.kernels.fused.tuple_kernel.TupleKernel`.
    """

    fused = True

    def __init__(
        self,
        formula: TupleFormula,
        particles: np.ndarray,
        *,
        constants: Mapping[str, float] | None = None,
        table: Table | None = None,
        periodic: bool,
        reference: Callable[..., Tensor] | None,
    ) -> None:
        self.formula, self.periodic, self.reference = formula, periodic, reference
        columns = particles.reshape(-1, formula.n_particles).T
        self._particles = np.ascontiguousarray(columns, dtype=np.int32)
        start = 2 + len(formula.item)
        self.framed = tuple(
            start + k for k, name in enumerate(formula.particle) if name in formula.framed
        )
        known = constants or {}
        self._constants = Constants([known[name] for name in formula.constants], table)
        self._lists: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def label(self) -> tuple[Hashable, ...]:
        """Equal for kernels that run the same programs."""
        return "items", self.formula, self.periodic

    # Kernel -----------------------------------------------------------------------------------

    def energies(self, inputs: Inputs) -> Tensor:
        """Energies ``(F,)``."""
        return self._run(inputs, [False] * len(inputs), None)[0]

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor, PerFrame]:
        """Energies, and derivatives of each frame's energy."""
        return self._run(inputs, wanted, None)

    def products(
        self, inputs: Inputs, directions: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> PerFrame:
        """Second derivatives times directions."""
        return self._run(inputs, wanted, directions)[1]

    def _has_frames(self, k: int) -> bool:
        return k < 2 or k in self.framed

    def _split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """What belongs to items, to particles, and to all."""
        n, m = len(self.formula.item), len(self.formula.particle)
        return tensors[2 : 2 + n], tensors[2 + n : 2 + n + m], tensors[2 + n + m :]

    def _run(
        self, inputs: Inputs, wanted: Sequence[bool], directions: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, PerFrame]:
        """As many frames at a time as memory is meant for."""
        n_frames, n_items = inputs[0].shape[0], self._particles.shape[1]
        if n_items == 0 or n_frames == 0:
            return inputs[0].new_zeros(n_frames), [
                t.new_zeros(n_frames, *(t.shape[1:] if self._has_frames(k) else t.shape))
                if on
                else None
                for k, (t, on) in enumerate(zip(inputs, wanted, strict=True))
            ]
        width = 3 + len(self.formula.item) + len(self.formula.particle)
        size = max(1, _NUMBERS // (self._particles.size * width))
        if n_frames <= size:
            return self._frames(inputs, wanted, directions)
        parts = []
        for start in range(0, n_frames, size):
            some = slice(start, start + size)
            own = [t[some] if self._has_frames(k) else t for k, t in enumerate(inputs)]
            moves = some_frames(directions, some)
            parts.append(self._frames(own, wanted, moves))
        energies = torch.cat([part[0] for part in parts])
        return energies, [
            None if column[0] is None else torch.cat([t for t in column if t is not None])
            for column in zip(*(part[1] for part in parts), strict=True)
        ]

    def _frames(
        self, inputs: Inputs, wanted: Sequence[bool], directions: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, PerFrame]:
        formula, positions, box = self.formula, inputs[0], inputs[1]
        n_frames, n_particles = positions.shape[:2]
        n_items, dtype = self._particles.shape[1], positions.dtype
        _, _, of_all = self._split(wanted)
        task = Task(
            positions=wanted[0] or wanted[1],
            particle=any(wanted[2 : len(wanted) - len(of_all)]),
            shared=any(of_all),
            second=directions is not None,
        )
        program = item_program(formula, task, dtype == torch.float64, self.periodic)
        particles, starts, entries = self._of(positions)
        items, particle, _ = self._split(inputs)
        own = [2 + len(items) + k in self.framed for k in range(len(particle))]
        common = [t for t, framed in zip(particle, own, strict=True) if not framed]
        framed = [t for t, framed in zip(particle, own, strict=True) if framed]
        of_items = positions.new_empty(n_frames, len(items) if task.particle else 0, n_items)
        parts = positions.new_empty(n_frames, program.n_parts, formula.n_particles, n_items)
        blocks = -(-n_items // BLOCK)
        sums = positions.new_empty(n_frames, blocks, program.n_sums, dtype=torch.float64)
        arrays = [
            *(particles, self._numbers(program, inputs, directions), box, positions),
            *(_rows(items, positions), _rows(common, positions), _rows(framed, positions, 1)),
            *self._directions(inputs, directions),
        ]
        arrays = [array.contiguous() for array in arrays]
        program.start(n_frames, n_items, n_particles, *arrays, of_items, parts, sums)
        gathered = positions.new_empty(n_frames, program.n_parts, n_particles)
        if program.n_parts:
            gather(starts, entries, parts, gathered)
        totals = sums.sum(dim=1)
        found: list[Tensor | None] = [None] * len(inputs)
        n = 2 + len(items)
        first = 0 if task.second else 1
        if task.positions:
            found[0] = gathered[:, :3].transpose(1, 2)
            found[1] = totals[:, first : first + 9].reshape(-1, 3, 3)[:, : box.shape[1]].to(dtype)
            first += 9
        if task.particle:
            found[2:n] = of_items.unbind(1)
            found[n : n + len(particle)] = gathered[:, 3 if task.positions else 0 :].unbind(1)
        if task.shared:
            found[n + len(particle) :] = totals[:, first:].to(dtype).unbind(-1)
        # A copy, since torch wants tangents of the same layout.
        energies = (
            positions.new_zeros(n_frames) if task.second else totals[:, 0].to(dtype, copy=True)
        )
        return energies, [f if on else None for f, on in zip(found, wanted, strict=True)]

    # What programs read -----------------------------------------------------------------------

    def _of(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Particles of items, and where each particle finds what belongs to it."""
        key = positions.device, positions.shape[1]
        if key not in self._lists:
            flat = self._particles.reshape(-1)
            entries = np.argsort(flat, kind="stable")
            starts = np.searchsorted(flat[entries], np.arange(key[1] + 1))
            self._lists[key] = tuple(  # type: ignore[assignment]
                torch.as_tensor(array, device=positions.device)
                for array in (self._particles, starts, entries)
            )
        return self._lists[key]

    def _directions(
        self, inputs: Inputs, directions: Sequence[Tensor | None] | None
    ) -> list[Tensor]:
        """Those of the box, positions, quantities of items and of particles."""
        if directions is None:
            return [inputs[0]] * 4
        n_frames, moves = inputs[0].shape[0], []
        for k, (tensor, move) in enumerate(zip(inputs, directions, strict=True)):
            if move is None:
                shape = tensor.shape if self._has_frames(k) else (n_frames, *tensor.shape)
                move = tensor.new_zeros(shape)
            moves.append(move)
        items, particle, _ = self._split(moves)
        return [moves[1], moves[0], _rows(items, inputs[0], 1), _rows(particle, inputs[0], 1)]

    def _numbers(
        self, program: ItemProgram, inputs: Inputs, directions: Sequence[Tensor | None] | None
    ) -> Tensor:
        """What all items share ``(F, per)``, in the order of the program."""
        moves = None if directions is None else self._split(directions)[2]
        fixed = self._constants.numbers(program.series, inputs[0])
        return shared_numbers(self._split(inputs)[2], moves, fixed, inputs[0].shape[0])


def _rows(tensors: Sequence[Tensor], like: Tensor, dim: int = 0) -> Tensor:
    """Stacked; a number that nobody reads if there are none."""
    return torch.stack(list(tensors), dim=dim) if tensors else like.new_empty(1)
