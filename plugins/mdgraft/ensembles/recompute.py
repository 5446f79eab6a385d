"""Graphs that are forgotten after the forward pass and rebuilt when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def leaves_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Every leaf tensor that a graph leads back to."""
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    found = {id(output): output for output in outputs if output.is_leaf and output.requires_grad}
    seen = set(pending)
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        for successor, _ in node.next_functions:
            if successor is not None and successor not in seen:
                seen.add(successor)
                pending.append(successor)
    return list(found.values())


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[], tuple[Tensor, ...]],
        values: list[Tensor],
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.function = function
        # Saved only so that a leaf which is changed in place before backward() is noticed.
        ctx.save_for_backward(*leaves)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            outputs = ctx.function()
            live = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad]
            gradients = torch.autograd.grad(
                [o for o, _ in live],
                leaves,
                [g for _, g in live],
                create_graph=create_graph,
                # What lies between a user's leaves and the function is shared by all batches.
                retain_graph=True,
                allow_unused=True,
            )
        return None, None, *gradients


def recompute(function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Call a function without keeping its graph; ``backward()`` calls it again.

    As ``torch.utils.checkpoint`` does, at the same price of a second evaluation, but functions
    that use ``torch.func`` inside (as `Potential.forces` does) are allowed. Derivatives of every
    order with respect to every leaf tensor that the function uses are exact.

    Parameters
    ----------
    function
        Returns a tuple of tensors; must give the same result each time it is called.

    Returns
    -------
    tuple of Tensor
        The function's result.
    """
    if not torch.is_grad_enabled():
        return function()
    outputs = function()
    leaves = leaves_of(outputs)
    values = [output.detach() for output in outputs]
    del outputs
    if not leaves:
        return tuple(values)
    # Some versions of torch leave `apply` without types.
    apply: Any = _Recomputed.apply
    result: tuple[Tensor, ...] = apply(function, values, *leaves)
    return result
