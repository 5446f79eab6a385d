"""Looking at plain values inside torch.func transforms.

A neighbour list and a check for NaN need the numbers themselves, which ``torch.func.grad``,
``jvp`` and ``vmap`` hide behind wrapper tensors. A custom ``autograd.Function`` is called with the
wrappers taken off, and its ``vmap`` rule sees the whole batch at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mdgraft.kernels.batching import one_by_one

#: ``fold(result, n_frames)`` turns a result over ``batch * n_frames`` frames into one that is
#: valid for every member of the batch.
Fold = Callable[[Tensor, int], Tensor]


class _Constant(torch.autograd.Function):
    """A function whose result is a constant of differentiation."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.n_inputs = len(inputs)
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, ...]:
        n_inputs: int = ctx.n_inputs
        return (None,) * n_inputs

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> None:
        return None


class _Observe(_Constant):
    @staticmethod
    def forward(function: Callable[..., Tensor], fold: Fold, *tensors: Tensor) -> Tensor:
        return function(*(tensor.detach() for tensor in tensors))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        function: Callable[..., Tensor],
        fold: Fold,
        *tensors: Tensor,
    ) -> tuple[Tensor, None]:
        n_frames = 0
        merged = []
        for tensor, dim in zip(tensors, in_dims[2:], strict=True):
            if dim is None:
                batched = tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
            else:
                batched = tensor.movedim(dim, 0)
            n_frames = batched.shape[1]
            merged.append(batched.reshape(-1, *batched.shape[2:]))
        return fold(observe(function, fold, *merged), n_frames), None


class _Each(_Constant):
    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return function(*(tensor.detach() for tensor in tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_Each, info, in_dims, args)


def constant(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call ``function`` on the plain values of ``tensors``; its result is a constant.

    Unlike in `observe` tensors may have any shape: members of a batch of ``torch.vmap`` are
    handed over one by one.
    """
    apply: Any = _Each.apply
    result: Tensor = apply(function, *tensors)
    return result


def observe(function: Callable[..., Tensor], fold: Fold, *tensors: Tensor) -> Tensor:
    """Call ``function`` on the plain values of ``tensors``; its result is a constant.

    Parameters
    ----------
    function
        Takes as many tensors as are given, each with a leading frame axis, and returns a tensor.
    fold
        Merges results when ``torch.vmap`` adds a batch in front of the frames.
    tensors
        Tensors of shape ``(frames, ...)``.
    """
    # Some versions of torch leave `apply` without types.
    apply: Any = _Observe.apply
    result: Tensor = apply(function, fold, *tensors)
    return result
