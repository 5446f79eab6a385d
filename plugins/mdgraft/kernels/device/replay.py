"""Energies of single configurations, with two derivatives, by replayed recordings."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mdgraft.kernels.derivatives import _needed
from mdgraft.kernels.device.recording import Function, NotRecordableError, Recording, recorder
from mdgraft.kernels.pieces import collecting
from mdgraft.kernels.switch import compiled_kernels, on_device, under_transform

#: ``(inputs) -> (1,)``: the energy by torch operations and kernels, as a differentiable function.
Energy = Callable[[Sequence[Tensor]], Tensor]

#: Evaluations of one kind after which the next one is recorded: what only comes once is not worth
#: it, and programs are compiled, compared and given their lists by the first ones.
_BEFORE = 2
#: Recordings that are kept; each holds memory of its own.
_MOST = 6


def may_replay(positions: Tensor) -> bool:
    """Whether an evaluation of positions ``(F, N, 3)`` may be a recorded one at all."""
    return (
        on_device(positions)
        and positions.shape[0] == 1
        and compiled_kernels(positions)
        and recorder(positions) is None
        and not collecting()
        and not under_transform()
        and not torch.is_inference_mode_enabled()
        and not torch.are_deterministic_algorithms_enabled()
        and not (positions.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _has_tangents(inputs: Sequence[Tensor]) -> bool:
    # Not a public number; it only saves time.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    unpack: Any = forward_ad.unpack_dual
    return any(unpack(t).tangent is not None for t in inputs)


class Replays:
    """Recordings of the evaluations of a potential, by what was asked for."""

    def __init__(self) -> None:
        self._seen: collections.Counter[Hashable] = collections.Counter()
        self._failed: set[Hashable] = set()
        self._kept: collections.OrderedDict[Hashable, Recording] = collections.OrderedDict()

    # A copy records for itself.
    def __deepcopy__(self, memo: object) -> Replays:
        return Replays()

    def __reduce__(self) -> tuple[Any, ...]:
        return Replays, ()

    def session(
        self,
        energy: Energy,
        check: Callable[[Sequence[Tensor]], None],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        key: Hashable,
    ) -> Session | None:
        """An evaluation by recordings; None if it is not (yet) one.

        Parameters
        ----------
        energy
            What is recorded.
        check
            Raises if the inputs are at fault.
        inputs
            Positions, box and parameters; `may_replay` has been asked.
        needed
            Inputs whose slopes are needed.
        key
            Whatever else the energy depends on.
        """
        kinds = {(t.dtype, t.device) for t in inputs}
        if len(kinds) != 1 or _has_tangents(inputs):
            return None
        whole = key, kinds.pop(), tuple(t.shape for t in inputs)
        session = Session(self, energy, check, inputs, tuple(needed), whole)
        return None if session.first_recording() is None else session

    def recording(
        self, key: Hashable, function: Function, inputs: Sequence[Tensor]
    ) -> Recording | None:
        """The recording of this name, made if it is time for it."""
        known = self._kept.get(key)
        if known is not None:
            self._kept.move_to_end(key)
            return known
        if key in self._failed:
            return None
        self._seen[key] += 1
        if self._seen[key] <= _BEFORE:
            return None
        try:
            made = Recording(function, inputs)
        except NotRecordableError as error:
            if error.__cause__ is None:
                # Lists have yet to be made.
                self._seen[key] = 0
            else:
                self._failed.add(key)
            return None
        self._kept[key] = made
        if len(self._kept) > _MOST:
            self._kept.popitem(last=False)
        return made

    def forget(self, key: Hashable) -> None:
        """Throw a recording away that cannot be renewed."""
        self._kept.pop(key, None)
        self._seen[key] = 0


class Session:
    """One evaluation: the functions that are recorded, and the inputs with their check."""

    def __init__(
        self,
        replays: Replays,
        energy: Energy,
        check: Callable[[Sequence[Tensor]], None],
        inputs: Sequence[Tensor],
        needed: tuple[bool, ...],
        key: Hashable,
    ) -> None:
        self._replays, self.function, self._check = replays, energy, check
        self._inputs, self.needed, self._key = inputs, needed, (key, needed)

    def energy(self) -> Tensor:
        """The energy ``(1,)``, differentiable in the inputs that need it."""
        apply: Any = _Energy.apply
        result: Tensor = apply(self, *self._inputs)
        return result

    # Energy and slopes ------------------------------------------------------------------------

    def first_recording(self) -> Recording | None:
        """The recording of the energy and its slopes."""
        return self._replays.recording(self._key, self._first, self._inputs)

    def first(self) -> tuple[Tensor, ...]:
        """The energy, then its slopes in the inputs that need them."""
        recording = self.first_recording()
        if recording is not None:
            found = recording(self._inputs, lambda: self._check(self._inputs))
            if found is not None:
                return found
            self._replays.forget(self._key)
        return tuple(t.detach() for t in self._first(self._inputs))

    def _first(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = _leaves(inputs, self.needed)
        with torch.enable_grad():
            energy = self.function(leaves)
            return [energy, *_slopes(energy, _chosen(leaves, self.needed))]

    # Second derivatives -----------------------------------------------------------------------

    def second(
        self, wanted: tuple[bool, ...], inputs: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Derivatives in what is wanted of all slopes along directions."""
        key = self._key, wanted
        n = len(inputs)

        def products(tensors: Sequence[Tensor]) -> list[Tensor]:
            return self.products(wanted, _leaves(tensors[:n], self.needed), tensors[n:])

        every = [*inputs, *directions]
        recording = self._replays.recording(key, products, every)
        if recording is not None:
            found = recording(every, lambda: self._check(inputs))
            if found is not None:
                return found
            self._replays.forget(key)
        return tuple(t.detach() for t in products(every))

    def products(
        self,
        wanted: Sequence[bool],
        leaves: Sequence[Tensor],
        directions: Sequence[Tensor],
        *,
        graph: bool = False,
    ) -> list[Tensor]:
        """The same by torch."""
        with torch.enable_grad():
            slopes = _slopes(self.function(leaves), _chosen(leaves, self.needed), graph=True)
            live = [(s, d) for s, d in zip(slopes, directions, strict=True) if s.requires_grad]
            chosen = _chosen(leaves, wanted)
            if not live:
                return [torch.zeros_like(t) for t in chosen]
            outputs, weights = zip(*live, strict=True)
            return list(
                torch.autograd.grad(
                    outputs,
                    chosen,
                    weights,
                    create_graph=graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )


def _leaves(inputs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [t.detach().requires_grad_(on) for t, on in zip(inputs, needed, strict=True)]


def _chosen(tensors: Sequence[Tensor], flags: Sequence[bool]) -> list[Tensor]:
    return [t for t, on in zip(tensors, flags, strict=True) if on]


def _slopes(energy: Tensor, leaves: Sequence[Tensor], *, graph: bool = False) -> list[Tensor]:
    if not leaves or not energy.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    return list(
        torch.autograd.grad(
            energy,
            leaves,
            torch.ones_like(energy),
            create_graph=graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _spread(values: Sequence[Tensor], flags: Sequence[bool]) -> list[Tensor | None]:
    """Values where flags are set, None elsewhere."""
    rest = iter(values)
    return [next(rest) if on else None for on in flags]


class _Energy(torch.autograd.Function):
    """``(session, *inputs) -> (1,)``."""

    @staticmethod
    def forward(ctx: Any, session: Session, *inputs: Tensor) -> Tensor:
        energy, *slopes = session.first()
        ctx.session, ctx.slopes = session, slopes
        ctx.save_for_backward(*inputs)
        return energy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (weight,) = grad_outputs
        needed = ctx.session.needed
        asked = _needed(ctx, needed)
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            apply: Any = _Slopes.apply
            found = apply(ctx.session, tuple(ctx.slopes), weight, *inputs)
        else:
            found = torch._foreach_mul(ctx.slopes, weight.reshape(())) if ctx.slopes else []
        every = _spread(found, needed)
        return (None, *(t if on else None for t, on in zip(every, asked, strict=True)))


class _Slopes(torch.autograd.Function):
    """``(session, slopes, weight, *inputs)``: slopes times a weight ``(1,)``."""

    @staticmethod
    def forward(
        ctx: Any,
        session: Session,
        slopes: tuple[Tensor, ...],
        weight: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.session, ctx.slopes = session, slopes
        ctx.save_for_backward(weight, *inputs)
        ctx.set_materialize_grads(True)
        return tuple(torch._foreach_mul(list(slopes), weight.reshape(())))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        flags = _needed(ctx, ctx.needs_input_grad[2:])
        asked = tuple(a and b for a, b in zip(flags[1:], ctx.session.needed, strict=True))
        session, directions = ctx.session, [g.contiguous() for g in grad_outputs]
        change: Tensor | None = None
        if torch.is_grad_enabled():
            # A third derivative is on its way: by torch operations from here on.
            products = session.products(asked, inputs, directions, graph=True)
            found = [p * weight.reshape(()) for p in products]
            if flags[0]:
                slopes = _slopes(
                    session.function(inputs), _chosen(inputs, session.needed), graph=True
                )
                change = _dot(slopes, directions)
        else:
            products = session.second(asked, inputs, directions)
            found = list(torch._foreach_mul(list(products), weight.reshape(()))) if products else []
            if flags[0]:
                change = _dot(ctx.slopes, directions)
        if change is not None:
            change = change.reshape(weight.shape)
        return (None, None, change, *_spread(found, asked))


def _dot(slopes: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    return torch.stack([(s * d).sum() for s, d in zip(slopes, directions, strict=True)]).sum()
