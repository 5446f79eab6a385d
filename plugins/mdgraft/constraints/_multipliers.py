"""Multipliers of constrained distances as implicit functions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import ConstraintError
from mdgraft.constraints._clusters import AbstractClusters, dot
from mdgraft.constraints.newton import Newton, differentiable_limit


@dataclasses.dataclass(kw_only=True)
class Problem:
    """What is solved, and how well it was.

    Attributes
    ----------
    clusters
        The batch of clusters.
    solver
        Newton's iteration, unless the host has projected.
    loosest
        Largest relative error of a length among all clusters and frames.
    """

    clusters: AbstractClusters
    solver: Newton
    loosest: float = 0.0

    def require(self, dtype: torch.dtype) -> None:
        """Raise unless the solution is good enough for derivatives."""
        limit, asked = differentiable_limit(dtype), self.solver.tolerance or 0.0
        if max(self.loosest, asked) <= limit:
            return
        if asked > limit:
            loose = f"got a tolerance of {asked:.1e}"
        else:
            loose = f"met the constraints only to a relative error of {self.loosest:.1e}"
        raise ConstraintError(
            f"solver: {loose}, but derivatives would be wrong by as much and need {limit:.0e}; "
            "ask for a smaller tolerance, of the host where that projects, or work under "
            "torch.no_grad()"
        )


def multipliers(
    problem: Problem,
    trial: Tensor,
    reference: Tensor,
    coupling: Tensor,
    squares: Tensor,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve ``|r*_a + sum_b C_ab kappa_b r_b|^2 = d_a^2``, differentiably to every order.

    The derivative is one linear solve with the transposed Jacobian J, by the implicit function
    theorem: with ``J^T mu = kappa_bar`` and ``rho_a = -2 mu_a r'_a``, the adjoint of r*_a is
    rho_a, that of r_b is ``kappa_b sum_a C_ab rho_a``, that of C_ab is ``kappa_b rho_a . r_b`` and
    that of d_a^2 is mu_a.

    Parameters
    ----------
    problem
        Clusters and solver.
    trial, reference, coupling, squares
        See `Newton.solve`.
    given
        What the host's projection has added to the trial vectors, or None.

    Returns
    -------
    tuple of Tensor
        kappa ``(F, K, m)`` [Da], and relative errors of lengths ``(F, K)``.
    """
    if torch.is_grad_enabled() and any(
        t.requires_grad for t in (trial, reference, coupling, squares)
    ):
        # Before anything is computed, if the caller asks for a loose tolerance.
        problem.require(trial.dtype)
    # Some versions of torch leave `apply` without types.
    apply: Any = _Multipliers.apply
    kappa, residual = apply(problem, trial, reference, coupling, squares, given)
    if kappa.requires_grad:
        problem.require(trial.dtype)
    return kappa, residual


def _jacobian(
    clusters: AbstractClusters, vectors: Tensor, reference: Tensor, coupling: Tensor
) -> Tensor:
    matrix = clusters.matrix(2.0 * coupling * clusters.products(vectors, reference))
    clusters.check_regular(matrix)
    return matrix


class _Multipliers(torch.autograd.Function):
    @staticmethod
    def forward(
        problem: Problem,
        trial: Tensor,
        reference: Tensor,
        coupling: Tensor,
        squares: Tensor,
        given: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        clusters = problem.clusters
        if given is None:
            solution = problem.solver.solve(clusters, trial, reference, coupling, squares)
        else:
            solution = _recovered(clusters, trial, reference, coupling, squares, given)
        if solution[1].numel():
            problem.loosest = max(problem.loosest, float(solution[1].max()))
        return solution

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.problem = inputs[0]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[1:5], output[0])
        ctx.save_for_forward(*inputs[1:5], output[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        problem: Problem = ctx.problem
        clusters = problem.clusters
        trial, reference, coupling, squares, kappa = ctx.saved_tensors
        problem.require(trial.dtype)
        vectors = trial + clusters.image(coupling, kappa.unsqueeze(-1) * reference)
        matrix = _jacobian(clusters, vectors, reference, coupling)
        mu = clusters.solve(matrix, grad_outputs[0], transposed=True)
        rho = -2.0 * mu.unsqueeze(-1) * vectors
        found: list[Any] = [None, rho, None, None, None, None]
        if ctx.needs_input_grad[2]:
            found[2] = kappa.unsqueeze(-1) * clusters.image(coupling, rho)
        if ctx.needs_input_grad[3]:
            moved = kappa.unsqueeze(-1) * reference
            found[3] = clusters.products(rho, moved).sum_to_size(coupling.shape)
        if ctx.needs_input_grad[4]:
            found[4] = mu.sum_to_size(squares.shape)
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        problem: Problem = ctx.problem
        clusters = problem.clusters
        trial, reference, coupling, _, kappa = ctx.saved_tensors
        problem.require(trial.dtype)
        moved = kappa.unsqueeze(-1) * reference
        vectors = trial + clusters.image(coupling, moved)
        change = torch.zeros_like(vectors)
        if grad_inputs[1] is not None:
            change = change + grad_inputs[1]
        if grad_inputs[2] is not None:
            change = change + clusters.image(coupling, kappa.unsqueeze(-1) * grad_inputs[2])
        if grad_inputs[3] is not None:
            change = change + clusters.image(grad_inputs[3], moved)
        target = -2.0 * dot(vectors, change)
        if grad_inputs[4] is not None:
            target = target + grad_inputs[4]
        matrix = _jacobian(clusters, vectors, reference, coupling)
        return clusters.solve(matrix, target), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        problem, *tensors = args
        moved = [
            t if t is None or dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        batched = [dim is not None for dim in in_dims[1:]]
        size, n_frames = info.batch_size, moved[0].shape[1 if batched[0] else 0]

        def merged(t: Tensor | None, on: bool, shared: bool) -> Tensor | None:
            if t is None or (shared and not on and t.shape[0] == 1):
                return t
            full = t if on else t.unsqueeze(0)
            return full.expand(size, n_frames, *full.shape[2:]).flatten(0, 1)

        # What is the same in all frames is left to broadcast.
        shared = (False, False, True, True, False)
        inputs = (merged(*each) for each in zip(moved, batched, shared, strict=True))
        apply: Any = _Multipliers.apply
        results = apply(problem, *inputs)
        return tuple(r.reshape(size, n_frames, *r.shape[1:]) for r in results), (0, 0)


def _recovered(
    clusters: AbstractClusters,
    trial: Tensor,
    reference: Tensor,
    coupling: Tensor,
    squares: Tensor,
    given: Tensor,
) -> tuple[Tensor, Tensor]:
    """Multipliers that explain what the host did, and how well its result meets them."""
    matrix = clusters.matrix(coupling * clusters.products(reference, reference))
    kappa = clusters.solve_plain(matrix, dot(reference, given))
    explained = clusters.image(coupling, kappa.unsqueeze(-1) * reference)
    lengths = squares.sqrt()
    final = torch.linalg.vector_norm(trial + given, dim=-1)
    error = torch.maximum(
        (final - lengths).abs(), torch.linalg.vector_norm(explained - given, dim=-1)
    )
    if clusters.present is not None:
        error = error * clusters.present
    return kappa, (error / lengths).amax(dim=-1)
