"""Particles that follow the others at the minimum of the energy, as Drude oscillators do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError, SimulationError
from mdgraft._types import BoxLike, PositionsLike
from mdgraft.kernels.batching import one_by_one
from mdgraft.kernels.implicit import Linear, conjugate_gradients
from mdgraft.kernels.observe import constant
from mdgraft.potentials._inputs import as_frames
from mdgraft.potentials.potential import Potential

#: No particle moves farther in one iteration [nm].
_LARGEST_STEP = 0.02
#: Relative residual of the linear solves of the search, which need not be accurate.
_SEARCH_RESIDUAL = 1e-4

_FAILURE = (
    "particles: the energy has no minimum in their positions here (a polarization catastrophe?); "
    "check polarizabilities and screening, or start closer to one"
)


class SelfConsistent(nn.Module):
    r"""A potential in which some particles are always at their energy minimum.

    E*(x, theta) = min_d E(x, d, theta) over the positions d of the given particles, by Newton's
    method with conjugate gradients; what ``positions`` holds for them is where the search starts.
    The search leaves no graph. By the envelope theorem dE* = dE at fixed d. Second derivatives
    have the response, d^2 E* = d^2 E - (d g)^T H^{-1} (d g) with g = dE/dd, H = d^2 E/dd^2; they
    and the first derivatives of the relaxed positions, -H^{-1} dg, cost one linear solve for each
    vector they are applied to. These are exact; derivatives of still higher order are not.

    All terms need second derivatives, so none may be one that the host evaluates without them.

    Parameters
    ----------
    potential
        The energy; its parameters appear as ``potential.<name>``.
    particles
        Indices of the particles that relax, each once.
    tolerance
        Largest component of the force on them at the end [kJ/mol/nm]. The search also ends where
        steps are rounded away.
    max_iterations
        Newton iterations before it fails.

    Raises
    ------
    InvalidInputError
        If an index is out of range or repeated.

    References
    ----------
    G. Lamoureux and B. Roux, J. Chem. Phys. 119, 3025 (2003).
    """

    particles: Tensor

    def __init__(
        self,
        potential: Potential,
        particles: Tensor | Sequence[int],
        *,
        tolerance: float = 1e-6,
        max_iterations: int = 60,
    ) -> None:
        super().__init__()
        given, n = torch.as_tensor(particles), potential.n_particles
        index = given.long()
        whole = given.dtype != torch.bool and bool((index == given).all())
        if not whole or index.ndim != 1 or bool(((index < 0) | (index >= n)).any()):
            raise InvalidInputError(
                f"particles: wanted a list of indices from 0 to {n - 1}, got {given.tolist()}"
            )
        if len(set(index.tolist())) != len(index):
            raise InvalidInputError("particles: an index occurs more than once; give each once")
        self.potential = potential
        self.register_buffer("particles", index.to(potential.device))
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def forward(self, positions: PositionsLike, box: BoxLike = None) -> Tensor:
        """Energy at the minimum.

        Parameters
        ----------
        positions
            ``(..., N, 3)`` [nm].
        box
            ``(..., 3, 3)`` [nm], as for `Potential`.

        Returns
        -------
        Tensor
            ``(...,)`` [kJ/mol].

        Raises
        ------
        SimulationError
            If there is no minimum near, as in a polarization catastrophe.
        """
        frames, cells, leading = as_frames(self.potential, positions, box)
        problem, tensors, lowest, slope = self._minimum(frames, cells)
        # Zero, and so is its derivative: what counts is the second one.
        correction: Any = _Quadratic.apply
        energy: Tensor = self.potential(frames.index_copy(1, self.particles, lowest), cells)
        total: Tensor = energy + correction(problem, slope, lowest, *tensors)
        return total.reshape(leading)

    def relax(self, positions: PositionsLike, box: BoxLike = None) -> Tensor:
        """Positions with the given particles at the minimum; arguments as in `forward`.

        Returns
        -------
        Tensor
            ``(..., N, 3)`` [nm], with exact first derivatives in positions, box and parameters.
            Rows of virtual sites are those given.
        """
        frames, cells, leading = as_frames(self.potential, positions, box)
        problem, tensors, lowest, slope = self._minimum(frames, cells)
        moved = lowest + _respond(problem, False, slope, lowest, *tensors)
        return frames.index_copy(1, self.particles, moved).reshape(*leading, *frames.shape[1:])

    def _minimum(
        self, frames: Tensor, cells: Tensor | None
    ) -> tuple[_Problem, tuple[Tensor, ...], Tensor, Tensor]:
        """The problem, its tensors, relaxed positions without a graph, the slope with one."""
        parameters = dict(self.potential.named_parameters())
        problem = _Problem(self, tuple(parameters), cells is not None)
        box = () if cells is None else (cells,)
        tensors = (frames, *box, *parameters.values())
        lowest = constant(problem.search, *tensors)

        def total(moving: Tensor) -> Tensor:
            energy: Tensor = self.potential(frames.index_copy(1, self.particles, moving), cells)
            return energy.sum()

        gradient: Any = torch.func.grad(total)
        return problem, tensors, lowest, gradient(lowest)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The minimisation, apart from its tensors: frames, a box if there is one, parameters."""

    module: SelfConsistent
    names: tuple[str, ...]
    has_box: bool

    def linearised(self, moving: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Linear]:
        """Gradient ``(frames, M, 3)`` at ``moving``, and products with the Hessian there."""
        frames, *rest = (tensor.detach() for tensor in tensors)
        box = rest.pop(0) if self.has_box else None
        parameters = dict(zip(self.names, rest, strict=True))

        def total(y: Tensor) -> Tensor:
            placed = frames.index_copy(1, self.module.particles, y)
            energy: Tensor = torch.func.functional_call(
                self.module.potential, parameters, (placed, box)
            )
            return energy.sum()

        linearise: Any = torch.func.vjp
        gradient, pullback = linearise(torch.func.grad(total), moving.detach())
        return gradient, lambda vector: pullback(vector)[0]

    def search(self, *tensors: Tensor) -> Tensor:
        """The minimum ``(frames, M, 3)`` near the positions given."""
        settings = self.module
        moving: Tensor = tensors[0][:, settings.particles]
        if not moving.numel():
            return moving
        rounding = 2 * torch.finfo(moving.dtype).eps * tensors[0].detach().abs().max()
        for _ in range(settings.max_iterations):
            gradient, hessian = self.linearised(moving, tensors)
            if bool((gradient.abs() <= settings.tolerance).all()):
                return moving
            step = conjugate_gradients(hessian, -gradient, _SEARCH_RESIDUAL, failure=_FAILURE)
            length = torch.linalg.vector_norm(step, dim=-1, keepdim=True)
            step = step * (_LARGEST_STEP / length.clamp(min=_LARGEST_STEP))
            moving = moving + step
            if bool((step.abs() <= rounding).all()):
                return moving
        raise SimulationError(
            f"particles: forces are still {float(gradient.abs().max()):.3g} kJ/mol/nm after "
            f"{settings.max_iterations} iterations, wanted {settings.tolerance:g}; start closer to "
            "the minimum, or allow a larger tolerance"
        )

    def response(self, vector: Tensor, moving: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """``-H^{-1} vector`` at the minimum."""
        if not vector.numel():
            return vector
        _, hessian = self.linearised(moving, tensors)
        residual = torch.finfo(vector.dtype).eps ** 0.75
        return conjugate_gradients(hessian, -vector.detach(), residual, failure=_FAILURE)


class _Response(torch.autograd.Function):
    """``-H^{-1} vector``; unless ``solve``, the vector is known to vanish, and so is the value."""

    @staticmethod
    def forward(
        problem: _Problem, solve: bool, vector: Tensor, moving: Tensor, *tensors: Tensor
    ) -> Tensor:
        return problem.response(vector, moving, tensors) if solve else torch.zeros_like(vector)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.problem = inputs[0]
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        # H is symmetric, and a constant.
        solution = _respond(ctx.problem, True, grad_outputs[0], *ctx.saved_tensors)
        return (None, None, solution, *(None for _ in ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        return _respond(ctx.problem, True, grad_inputs[2], *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_Response, info, in_dims, args)


def _respond(*args: Any) -> Tensor:
    # Some versions of torch leave `apply` without types.
    apply: Any = _Response.apply
    result: Tensor = apply(*args)
    return result


class _Quadratic(torch.autograd.Function):
    """``-slope.H^{-1}.slope/2`` for each frame, at a slope that vanishes."""

    @staticmethod
    def forward(problem: _Problem, slope: Tensor, moving: Tensor, *tensors: Tensor) -> Tensor:
        return slope.new_zeros(slope.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.problem = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        response = _respond(ctx.problem, False, *ctx.saved_tensors)
        others = (None for _ in ctx.saved_tensors[1:])
        return (None, grad_outputs[0][:, None, None] * response, *others)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        response = _respond(ctx.problem, False, *ctx.saved_tensors)
        return (response * grad_inputs[1]).sum(dim=(-2, -1))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_Quadratic, info, in_dims, args)
