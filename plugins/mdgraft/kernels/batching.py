"""A rule for `torch.vmap` that suits functions with nothing to gain from a batch."""

from __future__ import annotations

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
