"""Sparse linear equations with entries that are differentiated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_array, diags_array
from scipy.sparse.linalg import splu
from torch import Tensor


def solve(rows: Tensor, columns: Tensor, entries: Tensor, target: Tensor) -> Tensor:
    """Solution of sparse equations, differentiable to every order in entries and target.

    Factorised on the CPU in double precision by SuperLU. The derivative is another solution with
    the same or the transposed matrix.

    Parameters
    ----------
    rows, columns
        ``(E,)`` places of the entries.
    entries
        ``(..., E)``.
    target
        ``(..., m)``.

    Returns
    -------
    Tensor
        ``(..., m)``; not finite where the matrix is singular.
    """
    # Some versions of torch leave `apply` without types.
    apply: Any = _Solve.apply
    result: Tensor = apply(rows, columns, entries, target)
    return result


def smallest_pivots(rows: Tensor, columns: Tensor, entries: Tensor, size: int) -> Tensor:
    """Smallest pivot of each plain matrix ``(...)``, relative to the diagonal."""
    numbers = entries.detach().cpu().double().numpy()
    found = np.zeros(numbers.shape[:-1])
    places = (rows.cpu().numpy(), columns.cpu().numpy())
    for index in np.ndindex(*found.shape):
        matrix = csc_array((numbers[index], places), shape=(size, size))
        diagonal = np.abs(matrix.diagonal())
        if not (diagonal > 0).all():
            continue
        scale = diags_array(diagonal**-0.5)
        try:
            factors = splu((scale @ matrix @ scale).tocsc())
        except RuntimeError:
            # Exactly singular.
            continue
        found[index] = np.abs(factors.U.diagonal()).min()
    return torch.from_numpy(found).to(entries.device, entries.dtype)


def _solve_numbers(rows: Tensor, columns: Tensor, entries: Tensor, target: Tensor) -> Tensor:
    shape = np.broadcast_shapes(entries.shape[:-1], target.shape[:-1])
    size = target.shape[-1]
    matrices = entries.detach().expand(*shape, -1).cpu().double().numpy()
    vectors = target.detach().expand(*shape, -1).cpu().double().numpy()
    places = (rows.cpu().numpy(), columns.cpu().numpy())
    found = np.full((*shape, size), np.nan)
    for index in np.ndindex(*shape):
        if not (np.isfinite(matrices[index]).all() and np.isfinite(vectors[index]).all()):
            continue
        try:
            factors = splu(csc_array((matrices[index], places), shape=(size, size)))
        except RuntimeError:
            # Exactly singular.
            continue
        found[index] = factors.solve(vectors[index])
    return torch.from_numpy(found).to(target.device, target.dtype)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, columns: Tensor, entries: Tensor, target: Tensor) -> Tensor:
        return _solve_numbers(rows, columns, entries, target)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.places = inputs[:2]
        ctx.shapes = (inputs[2].shape, inputs[3].shape)
        ctx.save_for_backward(inputs[2], output)
        ctx.save_for_forward(inputs[2], output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        rows, columns = ctx.places
        entries, solution = ctx.saved_tensors
        adjoint = solve(columns, rows, entries, grad_outputs[0])
        to_entries = -adjoint[..., rows] * solution[..., columns]
        return None, None, to_entries.sum_to_size(ctx.shapes[0]), adjoint.sum_to_size(ctx.shapes[1])

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        rows, columns = ctx.places
        entries, solution = ctx.saved_tensors
        change: Any = torch.zeros_like(solution) if grad_inputs[3] is None else grad_inputs[3]
        if grad_inputs[2] is not None:
            products = grad_inputs[2] * solution[..., columns]
            change = change - torch.zeros_like(solution).index_add(-1, rows, products)
        return solve(rows, columns, entries, change)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        rows, columns, *tensors = args
        moved = [
            t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        return solve(rows, columns, *moved), 0
