"""Models that see plain tensors, whatever transforms of ``torch.func`` are outside.

A model that was not written for such transforms may use what they refuse: operations in place,
``requires_grad_`` on its inputs, autograd functions of the older kind, sizes that depend on data.
Here it is differentiated by ordinary autograd inside functions of our own, which transforms know
how to handle. Derivatives of any order are those of the model; `torch.vmap` calls it for one member
of a batch after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mdgraft.kernels.batching import one_by_one

#: A pure function of floating-point tensors.
Function: TypeAlias = Callable[..., tuple[Tensor, ...]]


def opaque(function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call a function of floating-point tensors with all transforms taken off."""
    keep = _wrapped(tensors, torch._C._functorch.is_gradtrackingtensor)
    apply: Any = _Opaque.apply
    result: tuple[Tensor, ...] = apply(_Call(function, keep=keep), *tensors)
    return result


def is_transformed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a transform of ``torch.func`` has wrapped any of these."""
    wraps = torch._C._functorch.is_functorch_wrapped_tensor
    return any(tensor is not None and wraps(tensor) for tensor in tensors)


def is_mapped(tensors: Sequence[Tensor | None]) -> bool:
    """Whether `torch.vmap` has made a batch of any of these, below any other transform."""
    return _wrapped(tensors, torch._C._functorch.is_batchedtensor)


def _wrapped(tensors: Sequence[Tensor | None], kind: Callable[[Tensor], bool]) -> bool:
    functorch = torch._C._functorch
    for tensor in tensors:
        while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
            if kind(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    return False


class _Call:
    """A function, and the graphs of its evaluations if they will be differentiated."""

    def __init__(self, function: Function, *, keep: bool) -> None:
        self.function = function
        #: How many results the function has; known once it has been evaluated.
        self.n_results = 0
        self._keep = keep
        self._graphs: dict[tuple[Any, ...], tuple[list[Tensor], tuple[Tensor, ...]]] = {}

    def evaluate(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Results without a graph."""
        if self._keep:
            leaves, results = self._record(tensors)
            self._graphs[_identity(tensors)] = leaves, results
        else:
            with torch.no_grad():
                results = self.function(*tensors)
        self.n_results = len(results)
        return tuple(result.detach() for result in results)

    def pull(self, places: Sequence[int], *args: Tensor) -> tuple[Tensor, ...]:
        """Gradients in the inputs at these places: ``(*tensors, *cotangents)``."""
        n = len(args) - self.n_results
        tensors, seeds = args[:n], args[n:]
        again = torch.is_grad_enabled() and any(arg.requires_grad for arg in args)
        known = None if again else self._graphs.get(_identity(tensors))
        leaves, results = self._record(tensors) if known is None else known
        return _gradients(results, [leaves[k] for k in places], seeds, again=again)

    def push(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Changes of the results along tangents: ``(*tensors, *tangents)``.

        They are linear in the tangents as gradients are in their seeds, and found by these.
        """
        n = len(args) // 2
        again = torch.is_grad_enabled() and any(arg.requires_grad for arg in args)
        leaves, results = self._record(args[:n])
        with torch.enable_grad():
            seeds = [torch.zeros_like(result, requires_grad=True) for result in results]
            slopes = _gradients(results, leaves, seeds, again=True)
        return _gradients(slopes, seeds, args[n:], again=again)

    def _record(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Evaluate with a graph; leaves are new unless the tensors have graphs themselves."""
        with torch.enable_grad():
            leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors]
            return leaves, self.function(*leaves)


def _identity(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((t.data_ptr(), t._version, t.shape, t.stride()) for t in tensors)


def _gradients(
    results: Sequence[Tensor], leaves: Sequence[Tensor], seeds: Sequence[Tensor], *, again: bool
) -> tuple[Tensor, ...]:
    live = [(r, seed) for r, seed in zip(results, seeds, strict=True) if r.requires_grad]
    if not live or not leaves:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    found: tuple[Tensor, ...] = torch.autograd.grad(
        [r for r, _ in live],
        list(leaves),
        [seed for _, seed in live],
        retain_graph=True,
        create_graph=again,
        allow_unused=True,
        materialize_grads=True,
    )
    return found


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call.evaluate(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        wanted = ctx.needs_input_grad[1:]
        places = [k for k, on in enumerate(wanted) if on]

        def pulled(*args: Tensor) -> tuple[Tensor, ...]:
            return call.pull(places, *args)

        found = iter(opaque(pulled, *ctx.saved_tensors, *grad_outputs))
        return (None, *(next(found) if on else None for on in wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        tensors = ctx.saved_tensors
        given = [
            torch.zeros_like(tensor) if tangent is None else tangent
            for tensor, tangent in zip(tensors, tangents[1:], strict=True)
        ]
        return opaque(ctx.call.push, *tensors, *given)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(_Opaque, info, in_dims, args)
