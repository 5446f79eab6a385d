"""Energies of bonds, angles, torsions and other lists, with derivatives, by compiled loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.fused.graph import Series
from mdgraft.kernels.fused.pair_formulas import Task
from mdgraft.kernels.fused.threads import run_chunks
from mdgraft.kernels.fused.tuples import ARRAYS, TupleFormula, TupleLoop, compiled_tuples
from mdgraft.kernels.kernel import Inputs, PerFrame

#: Items, times frames, that are worth a thread of their own.
_ITEMS_PER_THREAD = 20000


class TupleKernel:
    """A kernel, see `mdgraft.kernels.kernel.Kernel`, of a list of items.

    Its inputs are positions, box, quantities of items ``(items,)``, of particles ``(N,)`` and
    shared ones ``()``, in the formula's order.

    Parameters
    ----------
    formula
        The energy of an item.
    particles
        ``(items, formula.n_particles)`` indices, or ``(items,)`` of single particles.
    constants
        The formula's constants by name.
    table
        Coefficients of the series that the formula uses.
    periodic
        Whether vectors are those of nearest images.
    reference
        A plain torch form of the same energy.
    """

    fused = True

    def __init__(
        self,
        formula: TupleFormula,
        particles: np.ndarray,
        *,
        constants: Mapping[str, float] | None = None,
        table: Callable[[Series], np.ndarray] | None = None,
        periodic: bool,
        reference: Callable[..., Tensor] | None,
    ) -> None:
        self.formula = formula
        self.periodic = periodic
        self.reference = reference
        rows = particles.reshape(-1, formula.n_particles)
        self._particles = np.ascontiguousarray(rows, dtype=np.int32)
        self._table = table
        start = 2 + len(formula.item)
        self.framed = tuple(
            start + k for k, name in enumerate(formula.particle) if name in formula.framed
        )
        self._constants = [(constants or {})[name] for name in formula.constants]
        self._padded: dict[int, Tensor] = {}

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

    def _run(
        self, inputs: Inputs, wanted: Sequence[bool], directions: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, PerFrame]:
        formula, positions = self.formula, inputs[0]
        quantities = 2 + len(formula.item) + len(formula.particle)
        task = Task(
            positions=wanted[0] or wanted[1],
            particle=any(wanted[2:quantities]),
            shared=any(wanted[quantities:]),
            second=directions is not None,
        )
        double = positions.dtype == torch.float64
        n_frames = positions.shape[0]
        if len(self._particles) == 0 or n_frames == 0:
            return positions.new_zeros(n_frames), [
                positions.new_zeros(n_frames, *(t.shape[1:] if self._has_frames(k) else t.shape))
                if on
                else None
                for k, (t, on) in enumerate(zip(inputs, wanted, strict=True))
            ]
        by_frame = n_frames >= 4
        loop = compiled_tuples(
            formula,
            task,
            double=double,
            periodic=self.periodic,
            by_frame=by_frame,
            # As for sums over neighbours, where parameters take part only in the way back.
            framed_only=bool(self.framed)
            and not any(wanted[k] for k in range(2, quantities) if k not in self.framed),
        )
        run = self._by_frame if by_frame else self._by_item
        energies, results = run(loop, task, inputs, directions, wanted)
        return energies.to(positions.dtype), [
            result if on else None for result, on in zip(results, wanted, strict=True)
        ]

    def _has_frames(self, k: int) -> bool:
        return k < 2 or k in self.framed

    def _divided(self, particle: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Quantities of particles that all frames share, and those that differ."""
        start = 2 + len(self.formula.item)
        framed = [start + k in self.framed for k in range(len(particle))]
        return (
            [t for t, own in zip(particle, framed, strict=True) if not own],
            [t for t, own in zip(particle, framed, strict=True) if own],
        )

    def _split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """What belongs to items, to particles, and to all."""
        n, m = len(self.formula.item), len(self.formula.particle)
        return tensors[2 : 2 + n], tensors[2 + n : 2 + n + m], tensors[2 + n + m :]

    # Lanes are frames -------------------------------------------------------------------------

    def _by_frame(
        self,
        loop: TupleLoop,
        task: Task,
        inputs: Inputs,
        directions: Sequence[Tensor | None] | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, PerFrame]:
        function, lanes = loop.function, loop.lanes
        positions, box = inputs[0], inputs[1]
        n_frames, n_particles = positions.shape[:2]
        n_blocks = -(-n_frames // lanes)
        n_items = len(self._particles)

        def blocks(tensor: Tensor) -> Tensor:
            """``(F, ...)`` to ``(blocks, ..., lanes)``; the last frame fills up the last block."""
            missing = n_blocks * lanes - n_frames
            if missing:
                tensor = torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
            return tensor.reshape(n_blocks, lanes, *tensor.shape[1:]).movedim(1, -1).contiguous()

        def frames(tensor: Tensor) -> Tensor:
            return tensor.movedim(-1, 1).flatten(0, 1)[:n_frames]

        def by_column(tensor: Tensor, among: Sequence[bool]) -> list[Tensor | None]:
            """``(blocks, ..., columns, lanes)`` to ``(F, ...)`` for each column that is wanted."""
            each = tensor.unbind(-2) if task.particle else [tensor] * len(among)
            return [frames(t) if on else None for t, on in zip(each, among, strict=True)]

        def new(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return torch.zeros(n_blocks, *shape, lanes, dtype=dtype or positions.dtype)

        items, particle, shared = self._split(inputs)
        common, framed = self._divided(particle)
        arrays: dict[str, Tensor] = {
            "items": _columns(items, n_items, positions),
            "particle": _columns(common, n_particles, positions),
            "framed": blocks(torch.stack(framed, dim=-1)) if framed else new(0),
            "numbers": self._numbers(loop, shared, positions),
            "positions": blocks(positions),
            "sums": new(10 + len(shared), dtype=torch.float64),
            "of_positions": new(n_particles, 3) if task.positions else new(0),
            # Each is written once.
            "of_items": positions.new_empty(n_blocks, n_items, len(items), lanes)
            if task.particle
            else new(0),
            "of_particles": new(n_particles, len(particle)) if task.particle else new(0),
        }
        cells = [box] if self.periodic else []
        if directions is not None:
            move = torch.zeros_like(positions) if directions[0] is None else directions[0]
            arrays["positions"] = blocks(torch.cat([positions, move], dim=-1))
            cells += [torch.zeros_like(box) if directions[1] is None else directions[1]]
            names = ("item_moves", "particle_moves", "shared_moves")
            for name, of, moves in zip(
                names, (items, particle, shared), self._split(directions), strict=True
            ):
                columns = [
                    positions.new_zeros(n_frames, t.shape[-1] if t.ndim else 1).reshape(
                        n_frames, *t.shape[-1:]
                    )
                    if d is None
                    else d
                    for t, d in zip(of, moves, strict=True)
                ]
                arrays[name] = blocks(torch.stack(columns, dim=-1)) if columns else new(0)
        if self.periodic:
            arrays["box"] = blocks(torch.cat([cell.reshape(n_frames, 9) for cell in cells], dim=1))
        n_threads = max(
            1, min(torch.get_num_threads(), n_blocks * n_items * lanes // _ITEMS_PER_THREAD)
        )
        bounds = [n_blocks * k // n_threads for k in range(n_threads + 1)]
        pointers = _pointers(arrays, self._particles)

        def work(k: int) -> None:
            function(bounds[k], bounds[k + 1], n_items, n_particles, *pointers)

        run_chunks(work, n_threads)
        sums = frames(arrays["sums"])
        of_items, of_particles, _ = self._split(wanted)
        results: PerFrame = [
            frames(arrays["of_positions"]) if wanted[0] else None,
            sums[:, 1:10].reshape(-1, 3, 3).to(positions.dtype),
            *by_column(arrays["of_items"], of_items),
            *by_column(arrays["of_particles"], of_particles),
            *sums[:, 10:].to(positions.dtype).unbind(-1),
        ]
        if not self.periodic:
            results[1] = torch.zeros_like(box)
        return sums[:, 0], results

    # Lanes are items --------------------------------------------------------------------------

    def _by_item(
        self,
        loop: TupleLoop,
        task: Task,
        inputs: Inputs,
        directions: Sequence[Tensor | None] | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, PerFrame]:
        function, lanes = loop.function, loop.lanes
        positions, box = inputs[0], inputs[1]
        n_frames, n_particles = positions.shape[:2]
        n_items = len(self._particles)
        n_blocks = -(-n_items // lanes)

        def blocks(columns: Sequence[Tensor]) -> Tensor:
            """``(items,)`` each to ``(blocks, columns, lanes)``."""
            result = positions.new_zeros(len(columns), n_blocks * lanes)
            for k, column in enumerate(columns):
                result[k, :n_items] = column
            return result.reshape(-1, n_blocks, lanes).movedim(0, 1).contiguous()

        if lanes not in self._padded:
            padded = np.zeros((n_blocks * lanes, self.formula.n_particles), dtype=np.int32)
            padded[:n_items] = self._particles
            shaped = padded.reshape(n_blocks, lanes, -1).transpose(0, 2, 1)
            self._padded[lanes] = torch.from_numpy(np.ascontiguousarray(shaped))
        items, particle, shared = self._split(inputs)
        common, framed = self._divided(particle)
        n_threads = max(1, min(torch.get_num_threads(), n_items // _ITEMS_PER_THREAD))
        bounds = [n_blocks * k // n_threads for k in range(n_threads + 1)]
        fixed = {
            "items": blocks(items),
            "particle": _columns(common, n_particles, positions),
            "numbers": self._numbers(loop, shared, positions),
        }
        frames = []
        for f in range(n_frames):
            arrays = dict(fixed)
            arrays["positions"] = positions[f].contiguous()
            arrays["framed"] = _columns([t[f] for t in framed], n_particles, positions)
            cells = [box[f].reshape(-1)]
            if directions is not None:
                moves = [None if d is None else d[f] for d in directions]
                move = torch.zeros_like(positions[f]) if moves[0] is None else moves[0]
                arrays["positions"] = torch.cat([positions[f], move], dim=-1)
                cells += [torch.zeros_like(cells[0]) if moves[1] is None else moves[1].reshape(-1)]
                of_item, of_particle, of_all = self._split(moves)
                arrays["item_moves"] = blocks(_given(items, of_item))
                own = [
                    t[f] if self._has_frames(2 + len(items) + k) else t
                    for k, t in enumerate(particle)
                ]
                arrays["particle_moves"] = _columns(
                    _given(own, of_particle), n_particles, positions
                )
                arrays["shared_moves"] = _vector(_given(shared, of_all), positions)
            if self.periodic:
                arrays["box"] = torch.cat(cells)
            outputs = {
                "sums": torch.zeros(n_threads, 10 + len(shared), dtype=torch.float64),
                "of_positions": positions.new_zeros(n_threads, n_particles, 3),
                "of_items": positions.new_zeros(n_blocks, len(items), lanes),
                "of_particles": positions.new_zeros(n_threads, n_particles, len(particle)),
            }

            def work(k: int, arrays: Any = arrays, outputs: Any = outputs) -> None:
                own = {n: t if n == "of_items" else t[k] for n, t in outputs.items()}
                pointers = _pointers({**arrays, **own}, self._padded[lanes].numpy())
                function(bounds[k], bounds[k + 1], n_items, n_particles, *pointers)

            run_chunks(work, n_threads)
            sums = outputs["sums"].sum(dim=0)
            of_items = outputs["of_items"].movedim(1, 0).flatten(1)[:, :n_items]
            frames.append(
                [
                    sums[0],
                    outputs["of_positions"].sum(dim=0),
                    sums[1:10].reshape(3, 3)[: box.shape[1]].to(positions.dtype),
                    *of_items,
                    *outputs["of_particles"].sum(dim=0).unbind(-1),
                    *sums[10:].to(positions.dtype),
                ]
            )
        energies, *results = (torch.stack(column) for column in zip(*frames, strict=True))
        return energies, list(results)

    def _numbers(self, loop: TupleLoop, shared: Sequence[Tensor], like: Tensor) -> Tensor:
        fixed = [np.array(self._constants)]
        if loop.series:
            assert self._table is not None
            fixed += [self._table(series) for series in loop.series]
        constants = torch.as_tensor(np.concatenate(fixed), dtype=like.dtype)
        return torch.cat([_vector(shared, like), constants])


def _vector(numbers: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack([n.reshape(()) for n in numbers]) if numbers else like.new_zeros(0)


def _columns(columns: Sequence[Tensor], n: int, like: Tensor) -> Tensor:
    """``(n,)`` each to ``(n, columns)``."""
    return torch.stack(list(columns), dim=-1) if columns else like.new_zeros(n, 0)


def _given(tensors: Sequence[Tensor], moves: Sequence[Tensor | None]) -> list[Tensor]:
    return [
        torch.zeros_like(t) if move is None else move
        for t, move in zip(tensors, moves, strict=True)
    ]


def _pointers(arrays: Mapping[str, Tensor], particles: np.ndarray) -> list[int]:
    """Where the arrays lie, in the order of `ARRAYS`; what a loop does not use is nowhere."""
    addresses = {name: tensor.data_ptr() for name, tensor in arrays.items()}
    addresses["particles"] = particles.ctypes.data
    return [addresses.get(name, 0) for name in ARRAYS]
