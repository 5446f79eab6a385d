"""Energies with derivatives of their own, as functions that torch differentiates.

A kernel computes energies, first derivatives, and products of second derivatives with directions,
outside torch: an engine does, and so do compiled loops. Here they become autograd functions for
reverse and forward mode and `torch.vmap`, in any combination up to the second order. Beyond that a
kernel names a plain torch form to differentiate, or the derivative raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import UnsupportedDerivativeError
from mdgraft.kernels.batching import in_older_batch, older_batch, one_by_one
from mdgraft.kernels.kernel import Inputs, Kernel, PerFrame
from mdgraft.kernels.pieces import COLLECTED
from mdgraft.kernels.third_order import turns


def differentiable_energy(
    kernel: Kernel, positions: Tensor, box: Tensor | None, parameters: Sequence[Tensor]
) -> Tensor:
    """Energies ``(F,)`` [kJ/mol], differentiable in everything.

    Parameters
    ----------
    kernel
        Computes them.
    positions
        ``(F, N, 3)`` [nm].
    box
        ``(F, 3, 3)`` or ``(1, 3, 3)`` [nm], or None.
    parameters
        Shared by all frames, in the kernel's own order.

    Raises
    ------
    UnsupportedDerivativeError
        If a third derivative is asked for and the kernel has no plain form.
    """
    n_frames = positions.shape[0]
    cell = positions.new_zeros(n_frames, 0, 3) if box is None else box.expand(n_frames, 3, 3)
    inputs = (positions, cell, *parameters)
    pieces = COLLECTED.get()
    if pieces is not None:
        return pieces.add(kernel, inputs)
    apply: Any = _Energy.apply
    # Nodes between the leaves and the energy, see `asked_for`.
    result: Tensor = apply(_Call(kernel, inputs), *(t.view_as(t) for t in inputs))
    return result


class _Call:
    """One evaluation: the kernel, and first derivatives that came with the energies."""

    def __init__(self, kernel: Kernel, inputs: Inputs) -> None:
        self.kernel = kernel
        #: Whether each input has a frame axis.
        self.framed = tuple(k < 2 or k in kernel.framed for k in range(len(inputs)))
        graph = kernel.fused and torch.is_grad_enabled()
        self._eager = tuple(graph and t.requires_grad and t.numel() > 0 for t in inputs)
        self._known: tuple[list[tuple[Any, ...]], list[Tensor], PerFrame] | None = None

    def energies(self, inputs: Inputs) -> Tensor:
        if any(self._eager):
            energies, gradients = self.kernel.gradients(inputs, self._eager)
            if energies is not None:
                # The tensors themselves keep their storage from being used again.
                self._known = [_identity(t) for t in inputs], list(inputs), gradients
                return energies
        return self.kernel.energies(inputs)

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> PerFrame:
        if self._known is not None:
            identities, _, found = self._known
            complete = all(g is not None for g, on in zip(found, wanted, strict=True) if on)
            if complete and identities == [_identity(t) for t in inputs]:
                return found
        return self.kernel.gradients(inputs, wanted)[1]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride()


def asked_for(ctx: Any, flags: Sequence[bool]) -> tuple[bool, ...]:
    """Inputs whose derivatives the backward pass that runs asks for.

    Torch's own ``needs_input_grad`` is about all passes, and each entry of a parameter may cost
    energies although only forces are asked for.
    """

    def runs(node: Any) -> bool:
        try:
            return bool(torch._C._will_engine_execute_node(node))
        except (AttributeError, RuntimeError):
            # It does not answer for leaves.
            return True

    return tuple(on and runs(node) for on, (node, _) in zip(flags, ctx.next_functions, strict=True))


def _filled(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor.new_zeros(0) if gradient is None else gradient


class _Energy(torch.autograd.Function):
    """``(call, *inputs) -> (F,)``."""

    @staticmethod
    def forward(call: _Call, *inputs: Tensor) -> Tensor:
        return call.energies([t.detach() for t in inputs])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, asked_for(ctx, ctx.needs_input_grad[1:])
        apply: Any = _Gradient.apply
        gradients = apply(ctx.call, wanted, *tensors)
        (weight,) = grad_outputs
        result: list[Tensor | None] = [None]
        for k, (gradient, tensor) in enumerate(zip(gradients, tensors, strict=True)):
            if not wanted[k]:
                result.append(None)
            elif ctx.call.framed[k]:
                result.append(weight.reshape(-1, *(1,) * (gradient.ndim - 1)) * gradient)
            elif len(gradient) == 1:
                # A matrix product takes longer, on a GPU above all.
                result.append((weight * gradient.reshape(-1)).reshape(tensor.shape))
            else:
                flat = gradient.reshape(gradient.shape[0], tensor.numel())
                result.append((weight @ flat).reshape(tensor.shape))
        return tuple(result)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        tensors, tangents = ctx.saved_tensors, grad_inputs[1:]
        wanted = tuple(tangent is not None for tangent in tangents)
        n_frames = tensors[0].shape[0]
        given = [
            t.new_zeros(0) if tangent is None else _by_frame(tangent, framed, n_frames)
            for t, tangent, framed in zip(tensors, tangents, ctx.call.framed, strict=True)
        ]
        apply: Any = _Slope.apply
        change: Tensor = apply(ctx.call, wanted, len(tensors), *tensors, *given)
        return change

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _batch(_Energy, info, in_dims, args, n_leading=1, n_inputs=len(args) - 1)


class _Slope(torch.autograd.Function):
    """Derivatives along tangents ``(F,)``: ``(call, wanted, n, *inputs, *tangents)``.

    One function, because torch drops outer tangents of plain operations in a ``jvp``. Tangents
    have a frame axis, those of parameters too.
    """

    @staticmethod
    def forward(call: _Call, wanted: tuple[bool, ...], n: int, *args: Tensor) -> Tensor:
        inputs, tangents = [t.detach() for t in args[:n]], args[n:]
        change = inputs[0].new_zeros(inputs[0].shape[0])
        for gradient, tangent in zip(call.gradients(inputs, wanted), tangents, strict=True):
            if gradient is not None:
                change = change + _contract(gradient, tangent)
        return change

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, ctx.wanted, ctx.n, *rest = inputs
        ctx.save_for_backward(*rest)
        ctx.save_for_forward(*rest)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        tensors, tangents = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        needed = asked_for(ctx, ctx.needs_input_grad[3:])
        (weight,) = grad_outputs
        weighted = [
            weight.reshape(-1, *(1,) * (tangent.ndim - 1)) * tangent if on else tangent
            for tangent, on in zip(tangents, ctx.wanted, strict=True)
        ]
        products = _product(ctx.call, needed[: ctx.n], tensors, weighted)
        gradient: Any = _Gradient.apply
        gradients = gradient(ctx.call, needed[ctx.n :], *tensors)
        found = _shared(ctx.call, products, tensors, needed[: ctx.n])
        for gradient, on in zip(gradients, needed[ctx.n :], strict=True):
            weights = weight.reshape(-1, *(1,) * (gradient.ndim - 1))
            found.append(weights * gradient if on else None)
        return (None, None, None, *found)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        saved = _innermost(ctx.saved_tensors)
        tensors, tangents = saved[: ctx.n], saved[ctx.n :]
        given = _innermost(grad_inputs[3:])
        moves, turns = given[: ctx.n], given[ctx.n :]
        n_frames = tensors[0].shape[0]
        moved = tuple(move is not None for move in moves)
        products = _product(ctx.call, moved, tensors, tangents)
        gradient: Any = _Gradient.apply
        turned = tuple(turn is not None and on for turn, on in zip(turns, ctx.wanted, strict=True))
        gradients = gradient(ctx.call, turned, *tensors)
        change: Tensor = tensors[0].new_zeros(n_frames)
        for product, move, framed in zip(products, moves, ctx.call.framed, strict=True):
            if move is not None:
                change = change + _contract(product, _by_frame(move, framed, n_frames))
        for part, turn, on in zip(gradients, turns, turned, strict=True):
            if on:
                change = change + _contract(part, turn)
        return change

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _batch(_Slope, info, in_dims, args, n_leading=3, n_inputs=args[2])


class _Gradient(torch.autograd.Function):
    """``(call, wanted, *inputs) -> gradients`` of every frame; those not wanted are empty."""

    @staticmethod
    def forward(call: _Call, wanted: tuple[bool, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        if in_older_batch(inputs):
            return older_batch(_Gradient, (call, wanted, *inputs))
        found = call.gradients([t.detach() for t in inputs], wanted)
        # New tensors: what is known already may be asked for again.
        return tuple(
            t.new_zeros(0) if not on or g is None else g.view_as(g)
            for g, t, on in zip(found, inputs, wanted, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, asked_for(ctx, ctx.needs_input_grad[2:])
        directions = [
            g if on else t.new_zeros(0)
            for g, on, t in zip(grad_outputs, ctx.wanted, tensors, strict=True)
        ]
        products = _product(ctx.call, wanted, tensors, directions)
        found = _shared(ctx.call, products, tensors, wanted)
        return (None, None, *found)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor, ...]:
        tensors, tangents = ctx.saved_tensors, _innermost(grad_inputs[2:])
        n_frames = tensors[0].shape[0]
        directions = [
            t.new_zeros(0) if tangent is None else _by_frame(tangent, framed, n_frames)
            for tangent, t, framed in zip(tangents, tensors, ctx.call.framed, strict=True)
        ]
        return _product(ctx.call, ctx.wanted, tensors, directions)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _batch(_Gradient, info, in_dims, args, n_leading=2, n_inputs=len(args) - 2)


class _Product(torch.autograd.Function):
    """Second derivatives times directions: ``(call, wanted, n, *inputs, *directions)``.

    Directions and results have a frame axis; those that are zero or not wanted are empty.
    """

    @staticmethod
    def forward(call: _Call, wanted: tuple[bool, ...], n: int, *args: Tensor) -> tuple[Tensor, ...]:
        if in_older_batch(args):
            return older_batch(_Product, (call, wanted, n, *args))
        inputs = [t.detach() for t in args[:n]]
        directions = [None if d.numel() == 0 else d.detach() for d in args[n:]]
        products = call.kernel.products(inputs, directions, wanted)
        return tuple(_filled(p, t) for p, t in zip(products, inputs, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, ctx.wanted, ctx.n, *rest = inputs
        ctx.save_for_backward(*rest)
        ctx.save_for_forward(*rest)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        n = ctx.n
        tensors, directions = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        needed = asked_for(ctx, ctx.needs_input_grad[3:])
        # Second derivatives are symmetric: what multiplies the products multiplies from the left.
        left = [
            g if on else t.new_zeros(0)
            for g, on, t in zip(grad_outputs, ctx.wanted, tensors, strict=True)
        ]
        own = _product(ctx.call, needed[n:], tensors, left)
        through: list[Tensor | None] = [None] * n
        if any(needed[:n]):
            found = turns(ctx.call.kernel.reference, ctx.call.framed, tensors, directions, left)
            through = _shared(ctx.call, found, tensors, needed[:n])
        return (
            *(None, None, None, *through),
            *(p if on else None for p, on in zip(own, needed[n:], strict=True)),
        )

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor, ...]:
        n = ctx.n
        tensors, directions = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        moves, turns = grad_inputs[3 : 3 + n], grad_inputs[3 + n :]
        turned = [
            t.new_zeros(0) if turn is None else turn for t, turn in zip(tensors, turns, strict=True)
        ]
        change = _product(ctx.call, ctx.wanted, tensors, turned)
        if any(move is not None for move in moves):
            tensors, directions = _innermost(tensors), _innermost(directions)
            change = _product(ctx.call, ctx.wanted, tensors, _innermost(turned))
            n_frames = tensors[0].shape[0]
            moved = [
                t.new_zeros(0) if move is None else _by_frame(move, framed, n_frames)
                for t, move, framed in zip(tensors, _innermost(moves), ctx.call.framed, strict=True)
            ]
            apply: Any = _Turn.apply
            more = apply(ctx.call, ctx.wanted, n, *tensors, *directions, *moved)
            change = tuple(a + b for a, b in zip(change, more, strict=True))
        return change

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _batch(_Product, info, in_dims, args, n_leading=3, n_inputs=args[2])


def _product(
    call: _Call, wanted: Sequence[bool], tensors: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    apply: Any = _Product.apply
    result: tuple[Tensor, ...] = apply(call, tuple(wanted), len(tensors), *tensors, *directions)
    return result


def _by_frame(tangent: Tensor, framed: bool, n_frames: int) -> Tensor:
    """The tangent of an input, with a frame axis."""
    return tangent if framed else tangent.expand(n_frames, *tangent.shape)


def _contract(gradient: Tensor, tangent: Tensor) -> Tensor:
    """Sum over all but the frames."""
    return (gradient * tangent).reshape(gradient.shape[0], -1).sum(dim=-1)


def _shared(
    call: _Call, products: Sequence[Tensor], tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """What all frames contribute to derivatives in the inputs."""
    found: list[Tensor | None] = []
    for product, tensor, on, framed in zip(products, tensors, wanted, call.framed, strict=True):
        if not on:
            found.append(None)
        else:
            found.append(product if framed else product.sum(dim=0).reshape(tensor.shape))
    return found


class _Innermost(torch.autograd.Function):
    """The identity, with no tangent of an outer ``jvp``, which plain operations would drop."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        raise UnsupportedDerivativeError(
            "kernels have up to two derivatives in forward mode; take others by torch.func.grad or "
            "jacrev instead of jvp or jacfwd, or evaluate inside `with mdgraft.plain_kernels():`"
        )


def _innermost(tensors: Sequence[Tensor | None]) -> list[Any]:
    apply: Any = _Innermost.apply
    return [None if tensor is None else apply(tensor) for tensor in tensors]


class _Turn(torch.autograd.Function):
    """Third derivatives times two directions: ``(call, wanted, n, *inputs, *first, *second)``.

    One function, because torch drops outer tangents of plain operations in a ``jvp``.
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(call: _Call, wanted: tuple[bool, ...], n: int, *args: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            found = _turns(call, n, args)
        return tuple(
            turn.detach() if on else t.new_zeros(0)
            for turn, on, t in zip(found, wanted, args, strict=False)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, ctx.wanted, ctx.n, *rest = inputs
        ctx.save_for_backward(*rest)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        n = ctx.n

        def turned(*args: Tensor) -> tuple[Tensor, ...]:
            found = _turns(ctx.call, n, args)
            return tuple(turn for turn, on in zip(found, ctx.wanted, strict=True) if on)

        weights = tuple(g for g, on in zip(grad_outputs, ctx.wanted, strict=True) if on)
        vjp: Any = torch.func.vjp
        _, pull = vjp(turned, *ctx.saved_tensors)
        return (None, None, None, *pull(weights))

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        return _Innermost.jvp(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_Turn, info, in_dims, args)


def _turns(call: _Call, n: int, args: Sequence[Tensor]) -> list[Tensor]:
    """Third derivatives at inputs, along first and second directions, one after the other."""
    reference, framed = call.kernel.reference, call.framed
    return turns(reference, framed, args[:n], args[n : 2 * n], args[2 * n :])


def _batch(
    function: Any,
    info: Any,
    in_dims: Sequence[Any],
    args: Sequence[Any],
    *,
    n_leading: int,
    n_inputs: int,
    framed: Sequence[bool] | None = None,
) -> Any:
    """Rule for `torch.vmap`: a batch of frames is more frames, unless parameters differ.

    ``args`` are ``n_leading`` that are no tensors, the inputs, and tensors with a frame axis.
    """
    call = args[0]
    own = call.framed if framed is None else framed
    common = [n_leading + k for k in range(n_inputs) if not own[k]]
    if not call.kernel.fused or any(in_dims[k] is not None for k in common):
        return one_by_one(function, info, in_dims, args)

    def merged(arg: Tensor, dim: int | None) -> Tensor:
        if arg.numel() == 0 and arg.ndim == (1 if dim is None else 2):
            return arg.new_zeros(0)
        if dim is None:
            arg = arg.unsqueeze(0).expand(info.batch_size, *arg.shape)
        else:
            arg = arg.movedim(dim, 0)
        return arg.flatten(0, 1)

    folded = [
        arg if k < n_leading or k in common else merged(arg, dim)
        for k, (arg, dim) in enumerate(zip(args, in_dims, strict=True))
    ]
    result = function.apply(*folded)
    several = isinstance(result, tuple)
    outputs = [
        (t, None)
        if t.numel() == 0 and t.ndim == 1 and several
        else (t.unflatten(0, (info.batch_size, -1)), 0)
        for t in (result if several else (result,))
    ]
    if not several:
        return outputs[0]
    return tuple(t for t, _ in outputs), tuple(dim for _, dim in outputs)


for _function in (_Energy, _Slope, _Gradient, _Product, _Innermost, _Turn):
    # Torch asks for the signature in every call, which takes longer than a small kernel.
    _forward: Any = _function.forward
    _forward.__signature__ = inspect.signature(_forward)
