"""Derivatives of each chain from backward passes over all chains at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdgraft._errors import UnsupportedDerivativeError


def chain_jacobian(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Derivatives of quantities of each chain by leaves that all chains share.

    A backward pass over all chains is linear in its seed; its derivative by the seed tells the
    chains apart.

    Parameters
    ----------
    outputs
        Each ``(C, *S)``, with a graph.
    leaves
        P scalars in all.

    Returns
    -------
    tuple of Tensor
        Each ``(C, *S, P)``, float64.
    """
    seeds = [torch.ones_like(output, requires_grad=True) for output in outputs]
    live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    columns: list[list[Tensor]] = [[] for _ in outputs]
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if live and leaves:
        gradients = torch.autograd.grad(
            [o for o, _ in live],
            leaves,
            [s for _, s in live],
            create_graph=True,
            allow_unused=True,
        )
    for leaf, gradient in zip(leaves, gradients, strict=True):
        flat = torch.zeros_like(leaf) if gradient is None else gradient
        for total in flat.reshape(-1):
            for place, part in enumerate(by_seed(total, seeds)):
                columns[place].append(part)
    return tuple(
        (torch.stack(parts, dim=-1) if parts else output[..., None][..., :0]).detach().double()
        for output, parts in zip(outputs, columns, strict=True)
    )


def by_seed(total: Tensor, seeds: Sequence[Tensor]) -> list[Tensor]:
    """Derivatives of a number that is linear in the seeds.

    Raises
    ------
    UnsupportedDerivativeError
        If they do not add up to the number, because some operation's backward pass has cut its
        graph.
    """
    parts: Sequence[Tensor | None] = [None] * len(seeds)
    if total.requires_grad:
        parts = torch.autograd.grad(total, seeds, retain_graph=True, allow_unused=True)
    found = [
        torch.zeros_like(seed) if part is None else part.detach()
        for part, seed in zip(parts, seeds, strict=True)
    ]
    products = [(p * s).detach().double() for p, s in zip(found, seeds, strict=True)]
    summed = sum(float(product.sum()) for product in products)
    size = sum(float(product.abs().sum()) for product in products)
    wanted = float(total.detach())
    if abs(summed - wanted) > 1e-3 * max(size, abs(wanted)):
        raise UnsupportedDerivativeError(
            "energy: the backward pass of one of its operations cannot be differentiated"
        )
    return found
