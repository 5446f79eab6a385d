"""Energies whose derivatives in every frame come from `torch.vmap`, for those who collect them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mdgraft.kernels.derivatives import differentiable_energy
from mdgraft.kernels.kernel import Inputs, PerFrame
from mdgraft.kernels.pieces import COLLECTED

#: ``(positions, box, *parameters) -> (frames,)``.
Energy: TypeAlias = Callable[..., Tensor]


def mapped_energy(
    energy: Energy, positions: Tensor, box: Tensor | None, parameters: Sequence[Tensor]
) -> Tensor:
    """Energies ``(F,)`` [kJ/mol] for `mdgraft.kernels.pieces.collected`.

    Parameters
    ----------
    energy
        A function of tensors that `torch.vmap` maps over frames at little more than the cost of a
        batch.
    positions, box, parameters
        Its arguments, see `differentiable_energy`.
    """
    return differentiable_energy(_Mapped(energy), positions, box, parameters)


class _Mapped:
    """A kernel, see `mdgraft.kernels.kernel.Kernel`, that is good for one collection."""

    fused = False
    framed: tuple[int, ...] = ()
    reference: Energy | None = None

    def __init__(self, energy: Energy) -> None:
        self._energy = energy

    def energies(self, inputs: Inputs) -> Tensor:
        positions, box, *parameters = inputs
        with _apart():
            return self._energy(positions, box if box.shape[1] else None, *parameters)

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor | None, PerFrame]:
        places = [k for k, on in enumerate(wanted) if on]
        found: PerFrame = [None] * len(inputs)
        if not places:
            return None, found

        def of_frame(positions: Tensor, box: Tensor, *parameters: Tensor) -> Tensor:
            cell = box[None] if box.shape[0] else None
            return self._energy(positions[None], cell, *parameters).squeeze(0)

        both: Any = torch.func.grad_and_value(of_frame, argnums=tuple(places))
        in_dims = (0, 0, *(None for _ in inputs[2:]))
        with _apart():
            slopes, energies = torch.func.vmap(both, in_dims=in_dims)(*inputs)
        for k, slope in zip(places, slopes, strict=True):
            found[k] = slope
        return energies, found

    def products(
        self, inputs: Inputs, directions: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> PerFrame:
        raise NotImplementedError("only first derivatives are collected")


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Kernels inside are not collected: what they find is differentiated further."""
    token = COLLECTED.set(None)
    try:
        yield
    finally:
        COLLECTED.reset(token)
