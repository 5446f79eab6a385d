"""Third derivatives, by the plain torch form of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdgraft._errors import UnsupportedDerivativeError


def turns(
    reference: Callable[..., Tensor] | None,
    framed: Sequence[bool],
    tensors: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
) -> list[Tensor]:
    """Derivatives of ``first . (second derivatives) . second`` of each frame."""
    if reference is None:
        raise UnsupportedDerivativeError(
            "a term that its host evaluates has derivatives up to the second order; graft it by "
            "the native route where there is one, or ask for one order less"
        )

    def along(directions: Sequence[Tensor], f: int, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            torch.zeros_like(t) if d.numel() == 0 else d[f].reshape(t.shape)
            for d, t in zip(directions, inputs, strict=True)
        )

    found = []
    for f in range(tensors[0].shape[0]):
        frame = tuple(t[f : f + 1] if own else t for t, own in zip(tensors, framed, strict=True))
        right, left = along(first, f, frame), along(second, f, frame)

        every = tuple(range(len(frame)))

        def energy(*x: Tensor) -> Tensor:
            return reference(*x).sum()

        # Reverse mode throughout: forward mode cannot be nested in torch's own dual levels.
        function = energy
        for directions in (right, left):
            function = slope_along(torch.func.grad(function, argnums=every), directions)
        found.append(torch.func.grad(function, argnums=every)(*frame))
    if not found:
        return empty_per_frame(tensors, framed)
    return [
        torch.cat(column) if own else torch.stack(column)
        for column, own in zip(zip(*found, strict=True), framed, strict=True)
    ]


def slope_along(
    gradient: Callable[..., tuple[Tensor, ...]], directions: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """The slope of a function along a direction, given its gradient."""

    def slope(*x: Tensor) -> Tensor:
        parts = zip(gradient(*x), directions, strict=True)
        return torch.stack([(g * d).sum() for g, d in parts]).sum()

    return slope


def empty_per_frame(tensors: Sequence[Tensor], framed: Sequence[bool]) -> list[Tensor]:
    """Derivatives in the inputs of no frames at all."""
    return [
        t.new_zeros(0, *(t.shape[1:] if own else t.shape))
        for t, own in zip(tensors, framed, strict=True)
    ]
