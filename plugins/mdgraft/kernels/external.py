"""Energies that an engine outside torch computes, as differentiable functions.

The engine gives energies and first derivatives. Products with second derivatives are differences of
its first derivatives along the direction asked for, which is all that an adjoint, a force-matching
loss or a Hessian-vector product needs. Third derivatives raise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import UnsupportedDerivativeError
from mdgraft.kernels.batching import one_by_one

#: Positions ``(F, N, 3)``, box ``(F, 3, 3)`` (empty in an open system), then parameters.
Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """Displacements of differences.

    Attributes
    ----------
    positions, box
        Largest displacement of a component [nm] along a direction.
    parameters
        Displacement of a parameter, relative to the largest magnitude in its family (or to one
        if all are zero).
    """

    positions: float = 1e-6
    box: float = 1e-4
    parameters: float = 5e-3

    def of(self, k: int, array: np.ndarray) -> float:
        """Step of the ``k``-th array."""
        if k < 2:
            return (self.positions, self.box)[k]
        return self.parameters * (float(np.abs(array).max(initial=0.0)) or 1.0)


#: Points and weights of a central difference that is exact for polynomials of the fourth degree.
FOUR_POINTS: tuple[tuple[float, float], ...] = (
    (-2.0, 1 / 12),
    (-1.0, -2 / 3),
    (1.0, 2 / 3),
    (2.0, -1 / 12),
)


class Engine(Protocol):
    """What computes energies outside torch; numbers are float64 in nm and kJ/mol."""

    @property
    def steps(self) -> Steps:
        """Displacements of the differences that second-order products are."""

    def energies(self, arrays: Arrays) -> np.ndarray:
        """Energies ``(F,)``."""

    def gradients(self, arrays: Arrays, wanted: Sequence[bool]) -> list[np.ndarray | None]:
        """Derivatives of each frame's energy, ``(F, *shape)``, in those arrays that are wanted."""

    def mixed(
        self, arrays: Arrays, wanted: Sequence[bool], along: np.ndarray
    ) -> list[np.ndarray | None]:
        """Derivatives of ``sum(dE/dpositions * along)`` like `gradients`; positions excepted."""


def external_energy(
    engine: Engine, positions: Tensor, box: Tensor | None, parameters: Sequence[Tensor]
) -> Tensor:
    """Energies ``(F,)`` [kJ/mol], twice differentiable in everything.

    Parameters
    ----------
    engine
        Computes them.
    positions
        ``(F, N, 3)`` [nm].
    box
        ``(F, 3, 3)`` [nm], or None. Derivatives are those of the six entries that a reduced box
        has; they are zero for the others.
    parameters
        Shared by all frames, in the engine's own order.

    Raises
    ------
    UnsupportedDerivativeError
        If a third derivative is asked for.
    """
    cell = positions.new_zeros(positions.shape[0], 0, 3) if box is None else box
    apply: Any = _Energy.apply
    # Nodes between the leaves and the energy, see `_needed`.
    result: Tensor = apply(engine, *(t.view_as(t) for t in (positions, cell, *parameters)))
    return result


def _needed(ctx: Any, flags: Sequence[bool]) -> tuple[bool, ...]:
    """Inputs whose derivatives the backward pass that runs asks for.

    Torch's own ``needs_input_grad`` is about all passes, and each entry of a parameter would cost
    energies although only forces are asked for.
    """

    def runs(node: Any) -> bool:
        try:
            return bool(torch._C._will_engine_execute_node(node))
        except (AttributeError, RuntimeError):
            # It does not answer for leaves.
            return True

    return tuple(on and runs(node) for on, (node, _) in zip(flags, ctx.next_functions, strict=True))


def _arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [tensor.detach().to("cpu", torch.float64).numpy() for tensor in tensors]


def _like(array: np.ndarray | None, tensor: Tensor) -> Tensor:
    if array is None:
        return tensor.new_zeros(0)
    return torch.as_tensor(array, dtype=tensor.dtype, device=tensor.device)


class _Energy(torch.autograd.Function):
    """``(engine, *tensors) -> (F,)``."""

    @staticmethod
    def forward(engine: Engine, *tensors: Tensor) -> Tensor:
        return _like(engine.energies(_arrays(tensors)), tensors[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.engine, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, _needed(ctx, ctx.needs_input_grad[1:])
        apply: Any = _Gradient.apply
        gradients = apply(ctx.engine, wanted, *tensors)
        (weight,) = grad_outputs
        result: list[Tensor | None] = [None]
        for k, (gradient, tensor) in enumerate(zip(gradients, tensors, strict=True)):
            if not wanted[k]:
                result.append(None)
                continue
            weighted = weight.reshape(-1, *(1,) * (gradient.ndim - 1)) * gradient
            result.append(weighted if k < 2 else weighted.sum(dim=0).reshape(tensor.shape))
        return tuple(result)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        tensors, tangents = ctx.saved_tensors, grad_inputs[1:]
        wanted = tuple(tangent is not None for tangent in tangents)
        given = [
            t.new_zeros(0) if tangent is None else tangent
            for t, tangent in zip(tensors, tangents, strict=True)
        ]
        apply: Any = _Slope.apply
        change: Tensor = apply(ctx.engine, wanted, len(tensors), *tensors, *given)
        return change

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_Energy, info, in_dims, args)


class _Slope(torch.autograd.Function):
    """Derivatives along tangents ``(F,)``: ``(engine, wanted, n, *tensors, *tangents)``.

    One function, because torch drops outer tangents of plain operations in a ``jvp``.
    """

    @staticmethod
    def forward(engine: Engine, wanted: tuple[bool, ...], n: int, *inputs: Tensor) -> Tensor:
        tensors, tangents = inputs[:n], inputs[n:]
        found = engine.gradients(_arrays(tensors), wanted)
        change = tensors[0].new_zeros(tensors[0].shape[0])
        for gradient, tensor, tangent in zip(found, tensors, tangents, strict=True):
            if gradient is not None:
                change = change + _by_frame(_like(gradient, tensor) * tangent)
        return change

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.engine, ctx.wanted, ctx.n, *rest = inputs
        ctx.save_for_backward(*rest)
        ctx.save_for_forward(*rest)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        tensors, tangents = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        needed = _needed(ctx, ctx.needs_input_grad[3:])
        (weight,) = grad_outputs
        weights = [
            weight.reshape(-1, *(1,) * (t.ndim if k >= 2 else 2)) for k, t in enumerate(tensors)
        ]
        directions = [
            w * tangent if on else tangent
            for w, tangent, on in zip(weights, tangents, ctx.wanted, strict=True)
        ]
        product: Any = _Product.apply
        products = product(ctx.engine, needed[: ctx.n], ctx.n, *_constant(tensors), *directions)
        gradient: Any = _Gradient.apply
        gradients = gradient(ctx.engine, needed[ctx.n :], *tensors)
        gradients = [w * g if g.numel() else g for w, g in zip(weights, gradients, strict=True)]
        found = [
            (part if k < 2 else part.sum(dim=0).reshape(tensor.shape)) if on else None
            for parts, ons in ((products, needed[: ctx.n]), (gradients, needed[ctx.n :]))
            for k, (part, tensor, on) in enumerate(zip(parts, tensors, ons, strict=True))
        ]
        return (None, None, None, *found)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        tensors, tangents = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        moves, turns = grad_inputs[3 : 3 + ctx.n], grad_inputs[3 + ctx.n :]
        n_frames = tensors[0].shape[0]
        directions = [
            tangent.expand(n_frames, *tangent.shape) if k >= 2 and on else tangent
            for k, (tangent, on) in enumerate(zip(tangents, ctx.wanted, strict=True))
        ]
        product: Any = _Product.apply
        moved = tuple(move is not None for move in moves)
        products = product(ctx.engine, moved, ctx.n, *_constant(tensors), *directions)
        gradient: Any = _Gradient.apply
        turned = tuple(turn is not None and on for turn, on in zip(turns, ctx.wanted, strict=True))
        gradients = gradient(ctx.engine, turned, *tensors)
        change: Tensor = tensors[0].new_zeros(n_frames)
        for parts, others, ons in ((products, moves, moved), (gradients, turns, turned)):
            for part, other, on in zip(parts, others, ons, strict=True):
                if on:
                    change = change + _by_frame(part * other)
        return change

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_Slope, info, in_dims, args)


def _by_frame(products: Tensor) -> Tensor:
    return products.reshape(products.shape[0], -1).sum(dim=-1)


class _Gradient(torch.autograd.Function):
    """``(engine, wanted, *tensors) -> gradients``; those not wanted are empty."""

    @staticmethod
    def forward(engine: Engine, wanted: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        found = engine.gradients(_arrays(tensors), wanted)
        return tuple(_like(array, t) for array, t in zip(found, tensors, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.engine, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, _needed(ctx, ctx.needs_input_grad[2:])
        directions = [
            g if on else t.new_zeros(0)
            for g, on, t in zip(grad_outputs, ctx.wanted, tensors, strict=True)
        ]
        apply: Any = _Product.apply
        products = apply(ctx.engine, wanted, len(tensors), *_constant(tensors), *directions)
        result: list[Tensor | None] = [None, None]
        for k, (product, tensor) in enumerate(zip(products, tensors, strict=True)):
            shared = product.sum(dim=0).reshape(tensor.shape) if k >= 2 and wanted[k] else product
            result.append(shared if wanted[k] else None)
        return tuple(result)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor, ...]:
        tensors, tangents = ctx.saved_tensors, grad_inputs[2:]
        n_frames = tensors[0].shape[0]
        directions = []
        for k, (tangent, tensor) in enumerate(zip(tangents, tensors, strict=True)):
            if tangent is None:
                directions.append(tensor.new_zeros(0))
            else:
                directions.append(tangent if k < 2 else tangent.expand(n_frames, *tangent.shape))
        apply: Any = _Product.apply
        result: tuple[Tensor, ...] = apply(
            ctx.engine, ctx.wanted, len(tensors), *_constant(tensors), *directions
        )
        return result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_Gradient, info, in_dims, args)


class _Product(torch.autograd.Function):
    """Second derivatives times directions: ``(engine, wanted, n, *tensors, *directions)``.

    Linear in the directions, and so differentiable in them; the tensors are `_Constant`.
    """

    @staticmethod
    def forward(
        engine: Engine, wanted: tuple[bool, ...], n: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        tensors, directions = inputs[:n], inputs[n:]
        products = _products(engine, wanted, _arrays(tensors), _arrays(directions))
        return tuple(_like(p, t) for p, t in zip(products, tensors, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.engine, ctx.wanted, n, *rest = inputs
        ctx.save_for_backward(*rest[:n])
        ctx.save_for_forward(*rest[:n])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        tensors, n = ctx.saved_tensors, len(ctx.saved_tensors)
        needed = _needed(ctx, ctx.needs_input_grad[3:])
        wanted = needed[n:]
        # Second derivatives are symmetric: what multiplies the products multiplies from the left.
        directions = [
            g if on else t.new_zeros(0)
            for g, on, t in zip(grad_outputs, ctx.wanted, tensors, strict=True)
        ]
        apply: Any = _Product.apply
        products = apply(ctx.engine, wanted, n, *_constant(tensors), *directions)
        # Zeros reach `_Constant`, which raises if a third derivative is asked for.
        through = [
            torch.zeros_like(t) if on else None for t, on in zip(tensors, needed, strict=False)
        ]
        own = [p if on else None for p, on in zip(products, wanted, strict=True)]
        return (None, None, None, *through, *own)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor, ...]:
        tensors, n = ctx.saved_tensors, len(ctx.saved_tensors)
        directions = [
            t.new_zeros(0) if tangent is None else tangent
            for t, tangent in zip(tensors, grad_inputs[3 + n :], strict=True)
        ]
        apply: Any = _Product.apply
        result: tuple[Tensor, ...] = apply(
            ctx.engine, ctx.wanted, n, *_constant(tensors), *directions
        )
        return result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_Product, info, in_dims, args)


class _Constant(torch.autograd.Function):
    """The identity, through which no derivative passes: one that is asked for raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise _third_order()

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        raise _third_order()


def _constant(tensors: Sequence[Tensor]) -> list[Tensor]:
    apply: Any = _Constant.apply
    return [apply(tensor) for tensor in tensors]


def _third_order() -> UnsupportedDerivativeError:
    return UnsupportedDerivativeError(
        "a term that its host evaluates has derivatives up to the second order; graft it by the "
        "native route where there is one, or ask for one order less"
    )


def _products(
    engine: Engine,
    wanted: Sequence[bool],
    arrays: list[np.ndarray],
    directions: list[np.ndarray],
) -> list[np.ndarray | None]:
    """Second derivatives along one direction after the other, frame by frame."""
    n_frames = arrays[0].shape[0]
    sums: list[np.ndarray | None] = []
    for k, (array, on) in enumerate(zip(arrays, wanted, strict=True)):
        shape = array.shape if k < 2 else (n_frames, *array.shape)
        sums.append(np.zeros(shape) if on else None)
    for k, direction in enumerate(directions):
        for f in range(n_frames if direction.any() else 0):
            frame = [arrays[0][f : f + 1], arrays[1][f : f + 1], *arrays[2:]]
            change = direction[f : f + 1] if k < 2 else direction[f]
            if not change.any():
                continue
            for total, product in zip(
                sums, _product(engine, wanted, frame, k, change), strict=True
            ):
                if total is not None and product is not None:
                    total[f] += product[0]
    return sums


def _product(
    engine: Engine, wanted: Sequence[bool], frame: list[np.ndarray], k: int, change: np.ndarray
) -> list[np.ndarray | None]:
    """Second derivatives of one frame along a change of input ``k``."""
    step = engine.steps.of(k, frame[k]) / np.abs(change).max()

    def gradients(t: float, inputs: Sequence[bool]) -> list[np.ndarray | None]:
        moved = [*frame[:k], frame[k] + t * step * change, *frame[k + 1 :]]
        return engine.gradients(moved, inputs)

    if k == 0:
        # Engines know forces best: what else depends on them is the change of the force.
        nothing: list[np.ndarray | None] = [None] * len(frame)
        found = engine.mixed(frame, wanted, change) if any(wanted[1:]) else nothing
        if wanted[0]:
            only = [True, *(False for _ in frame[1:])]
            upper, lower = gradients(1.0, only)[0], gradients(-1.0, only)[0]
            assert upper is not None and lower is not None
            found[0] = (upper - lower) / (2 * step)
        return found
    sums: list[Any] = [0.0 if on else None for on in wanted]
    for t, weight in FOUR_POINTS:
        values = gradients(t, wanted)
        sums = [
            None if v is None else total + weight / step * v
            for total, v in zip(sums, values, strict=True)
        ]
    return sums
