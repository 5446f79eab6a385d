"""A rule for `torch.vmap` that suits functions with nothing to gain from a batch."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def one_by_one(function: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """Apply an autograd function to the members of a batch one after the other.

    Parameters
    ----------
    function
        Subclass of `torch.autograd.Function` with a tensor or a tuple of tensors as its result.
    info, in_dims, args
        What its ``vmap`` is given; arguments that are not tensors are the same for all members.

    Returns
    -------
    tuple
        The stacked results and their batch dimensions.
    """
    members = []
    for k in range(info.batch_size):
        member = [
            arg.select(dim, k) if isinstance(arg, Tensor) and dim is not None else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        members.append(function.apply(*member))
    if isinstance(members[0], tuple):
        stacked = tuple(torch.stack(column) for column in zip(*members, strict=True))
        return stacked, (0,) * len(stacked)
    return torch.stack(members), 0


def in_older_batch(args: Sequence[Tensor]) -> bool:
    """Whether ``is_grads_batched`` of `torch.autograd.grad` has made batches of some tensors.

    It uses an older kind of ``vmap``, which does not ask a function for its rule.
    """
    try:
        is_batched = torch._C._functorch.is_legacy_batchedtensor
    except AttributeError:
        # Not a public function: without it such batches raise torch's own error.
        return False
    return any(is_batched(arg) for arg in args)


def older_batch(function: Any, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Apply the ``vmap`` rule of a function, with a tuple of results, to such batches."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    unpacked, in_dims, size = [], [], 1
    for arg in args:
        batched = isinstance(arg, Tensor) and in_older_batch([arg])
        if batched:
            # The size that is passed only matters for tensors without a batch.
            arg = torch._remove_batch_dim(arg, level, 1, 0)
            size = arg.shape[0]
        unpacked.append(arg)
        in_dims.append(0 if batched else None)
    info = types.SimpleNamespace(batch_size=size)
    results, out_dims = function.vmap(info, tuple(in_dims), *unpacked)
    return tuple(
        result if dim is None else torch._add_batch_dim(result, dim, level)
        for result, dim in zip(results, out_dims, strict=True)
    )
