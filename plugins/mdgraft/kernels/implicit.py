"""Linear equations that are solved once and differentiated implicitly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mdgraft._errors import SimulationError
from mdgraft.kernels.batching import one_by_one

#: A linear map of vectors ``(frames, n, 3)``.
Linear = Callable[[Tensor], Tensor]


class Operator(Protocol):
    """A symmetric positive linear operator that depends on tensors."""

    def __call__(self, *tensors: Tensor) -> Linear:
        """A function that maps vectors ``(frames, n, 3)`` to their images."""


def linear_solve(
    operator: Operator,
    target: Tensor,
    *tensors: Tensor,
    failure: str,
    reference: Tensor | None = None,
) -> Tensor:
    """Solution of ``operator(*tensors)(x) = target``, differentiable in the target alone.

    The operator is a constant of differentiation; `response_form` carries its derivatives.

    Parameters
    ----------
    operator
        Called without a graph, on plain tensors under every ``torch.func`` transform.
    target
        ``(frames, n, 3)``.
    tensors
        What the operator depends on.
    failure
        What to say if the operator is not positive.
    reference
        What residuals are relative to; the target by default.

    Raises
    ------
    SimulationError
        If the operator is not positive, or nearly singular.
    """
    apply: Any = _LinearSolve.apply
    scale = target if reference is None else reference
    result: Tensor = apply(operator, failure, False, target, scale.detach(), *tensors)
    return result


def response_form(
    operator: Operator, first: Tensor, second: Tensor, *tensors: Tensor, failure: str
) -> Tensor:
    """``first . operator^{-1} . second`` for each frame, where both vectors are known to vanish.

    The value is zero and so is its first derivative; the second derivative is what the residuals
    of solved equations add to a function that is stationary at the solution. Arguments are those
    of `linear_solve`; derivatives of the third order are not exact.
    """
    apply: Any = _ResponseForm.apply
    result: Tensor = apply(operator, failure, first, second, *tensors)
    return result


def conjugate_gradients(
    operator: Linear,
    target: Tensor,
    residual: float,
    *,
    failure: str,
    reference: Tensor | None = None,
) -> Tensor:
    """Solve for each frame of ``target`` ``(frames, n, 3)``.

    The residual is relative to the ``reference``, by default the target itself.

    Raises
    ------
    SimulationError
        With the message ``failure``, if the operator is not positive.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(-2, -1), keepdim=True)

    if not target.numel():
        return target
    solution, rest, direction = torch.zeros_like(target), target, target
    size = dot(rest, rest)
    enough = residual**2 * (size if reference is None else dot(reference, reference))
    for _ in range(3 * target[0].numel() + 50):
        active = size > enough
        if not bool(active.any()):
            return solution
        image = operator(direction)
        curvature = dot(direction, image)
        if bool((active & (curvature <= 0)).any()):
            raise SimulationError(failure)
        step = torch.where(active, size / torch.where(active, curvature, 1.0), 0.0)
        solution, rest = solution + step * direction, rest - step * image
        before, size = size, dot(rest, rest)
        ratio = torch.where(active, size / torch.where(active, before, 1.0), 0.0)
        direction = rest + ratio * direction
    raise SimulationError(
        "the linear equations of a response did not converge; their operator is nearly singular. "
        + failure
    )


def _solve(*args: Any) -> Tensor:
    # Some versions of torch leave `apply` without types.
    apply: Any = _LinearSolve.apply
    result: Tensor = apply(*args)
    return result


class _LinearSolve(torch.autograd.Function):
    """The solution; zero if it is known to vanish, so that only its derivatives count."""

    @staticmethod
    def forward(
        operator: Operator,
        failure: str,
        vanishes: bool,
        target: Tensor,
        reference: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        if vanishes or not target.numel():
            return torch.zeros_like(target)
        plain = [tensor.detach() for tensor in tensors]
        residual = torch.finfo(target.dtype).eps ** 0.75
        return conjugate_gradients(
            operator(*plain), target.detach(), residual, failure=failure, reference=reference
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.problem = inputs[:2]
        ctx.save_for_backward(*inputs[5:])
        ctx.save_for_forward(*inputs[5:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        # The operator is symmetric.
        vector = grad_outputs[0]
        solution = _solve(*ctx.problem, False, vector, vector.detach(), *ctx.saved_tensors)
        return (None, None, None, solution, None, *(None for _ in ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        vector = grad_inputs[3]
        return _solve(*ctx.problem, False, vector, vector.detach(), *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_LinearSolve, info, in_dims, args)


class _ResponseForm(torch.autograd.Function):
    @staticmethod
    def forward(
        operator: Operator, failure: str, first: Tensor, second: Tensor, *tensors: Tensor
    ) -> Tensor:
        return first.new_zeros(first.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.problem = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        first, second, *tensors = ctx.saved_tensors
        weight = grad_outputs[0][:, None, None]
        to_first, to_second = (
            weight * _solve(*ctx.problem, True, vector, vector.detach(), *tensors)
            for vector in (second, first)
        )
        return (None, None, to_first, to_second, *(None for _ in tensors))

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        first, second, *tensors = ctx.saved_tensors
        total = 0.0
        for vector, tangent in ((second, grad_inputs[2]), (first, grad_inputs[3])):
            if tangent is not None:
                solution = _solve(*ctx.problem, True, vector, vector.detach(), *tensors)
                total = total + (solution * tangent).sum(dim=(-2, -1))
        return total

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_ResponseForm, info, in_dims, args)
