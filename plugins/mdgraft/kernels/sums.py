"""Sums that every particle gathers from its neighbours, as functions that torch differentiates.

A sum over neighbours, ``S_i = sum_j f(r_ij; q_i, q_j)``, is the derivative of the pair energy
``sum_(i<j) w_i f(r; q_i, q_j) + w_j f(r; q_j, q_i)`` in the weights w. Since that energy is linear
in them, a weighted derivative of the sums is its gradient with the weights put in: one pass over
pairs of a compiled kernel does all of it, and second derivatives are products of the same kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mdgraft.kernels.derivatives import (
    _batch,
    _by_frame,
    _Call,
    _Gradient,
    _product,
    _shared,
    asked_for,
)
from mdgraft.kernels.kernel import Kernel

#: Where the weights are among a kernel's inputs.
WEIGHTS = 2


def particle_sums(
    kernel: Kernel, positions: Tensor, box: Tensor | None, quantities: Sequence[Tensor]
) -> Tensor:
    """Sums ``(F, N)`` over the neighbours of each particle.

    Parameters
    ----------
    kernel
        Of the weighted energy; its first quantity is the weights, which differ between frames.
    positions
        ``(F, N, 3)`` [nm].
    box
        ``(F, 3, 3)`` [nm], or None.
    quantities
        The kernel's other inputs, in its own order.
    """
    n_frames = positions.shape[0]
    cell = positions.new_zeros(n_frames, 0, 3) if box is None else box.expand(n_frames, 3, 3)
    inputs = (positions, cell, *quantities)
    full = (positions, cell, positions.detach()[..., 0], *quantities)
    apply: Any = _Sums.apply
    result: Tensor = apply(_Call(kernel, full), *(t.view_as(t) for t in inputs))
    return result


def _weighted(inputs: Sequence[Any], weights: Any) -> list[Any]:
    return [*inputs[:WEIGHTS], weights, *inputs[WEIGHTS:]]


class _Sums(torch.autograd.Function):
    """``(call, *inputs without weights) -> (F, N)``."""

    @staticmethod
    def forward(call: _Call, *inputs: Tensor) -> Tensor:
        plain = [t.detach() for t in inputs]
        zero = torch.zeros_like(plain[0][..., 0])
        wanted = _weighted([False] * len(inputs), True)
        found = call.kernel.gradients(_weighted(plain, zero), wanted)[1][WEIGHTS]
        assert found is not None
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, asked_for(ctx, ctx.needs_input_grad[1:])
        (weights,) = grad_outputs
        apply: Any = _Gradient.apply
        inputs, needed = _weighted(tensors, weights), _weighted(wanted, False)
        found = _shared(ctx.call, apply(ctx.call, tuple(needed), *inputs), inputs, needed)
        del found[WEIGHTS]
        return (None, *found)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        tensors = ctx.saved_tensors
        n_frames = tensors[0].shape[0]
        framed = [f for k, f in enumerate(ctx.call.framed) if k != WEIGHTS]
        moves = [
            t.new_zeros(0) if move is None else _by_frame(move, own, n_frames)
            for t, move, own in zip(tensors, grad_inputs[1:], framed, strict=True)
        ]
        zero = torch.zeros_like(tensors[0][..., 0])
        wanted = _weighted([False] * len(tensors), True)
        result = _product(
            ctx.call, wanted, _weighted(tensors, zero), _weighted(moves, zero.new_zeros(0))
        )
        return result[WEIGHTS]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        framed = [f for k, f in enumerate(args[0].framed) if k != WEIGHTS]
        return _batch(_Sums, info, in_dims, args, n_leading=1, n_inputs=len(framed), framed=framed)
