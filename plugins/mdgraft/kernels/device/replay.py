"""Energies of single configurations, with two derivatives, by replayed recordings."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mdgraft.kernels.batching import in_older_batch
from mdgraft.kernels.derivatives import asked_for
from mdgraft.kernels.device.recording import (
    Function,
    NotRecordableError,
    Outputs,
    Recording,
    recorder,
)
from mdgraft.kernels.pieces import collecting
from mdgraft.kernels.switch import compiled_kernels, on_device, under_transform

#: ``(inputs) -> (1,)``: the energy by torch operations and kernels, as a differentiable function.
Energy = Callable[[Sequence[Tensor]], Tensor]

#: Evaluations of one kind after which the next one is recorded: what only comes once is not worth
#: it, and programs are compiled, compared and given their lists by the first ones.
_BEFORE = 2
#: Recordings that are kept; each holds memory of its own.
_MOST = 6
#: Kinds of evaluations that are remembered.
_KINDS = 64


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
        # What these change or want to see is in the middle of an evaluation.
        and not torch.is_autocast_enabled(positions.device.type)
        and not torch.is_anomaly_enabled()
        and not _saves_elsewhere()
        and not (positions.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _saves_elsewhere() -> bool:
    """Whether `torch.autograd.graph.saved_tensors_hooks` are in place, as for checkpoints."""
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    except (AttributeError, TypeError):
        # Not a public function. Without it, hooks see the inputs alone.
        return False


def _has_tangents(inputs: Sequence[Tensor]) -> bool:
    # Not a public number; it only saves time.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    unpack: Any = forward_ad.unpack_dual
    return any(unpack(t).tangent is not None for t in inputs)


@dataclasses.dataclass
class _Kind:
    """Evaluations that one recording would be good for."""

    #: What the key names by its identity, which must not become that of something else.
    held: object
    #: How many are still to come before the next one is recorded; None if it cannot be.
    waits: int | None = _BEFORE
    patience: int = _BEFORE
    recording: Recording | None = None

    def put_off(self) -> None:
        """Wait, longer each time, before it is tried again."""
        self.recording, self.waits = None, self.patience
        self.patience = min(2 * self.patience, 64)


class Replays:
    """Recordings of the evaluations of a potential, by what was asked for."""

    def __init__(self) -> None:
        #: The last ones that were asked for, the latest last.
        self._kinds: collections.OrderedDict[Hashable, _Kind] = collections.OrderedDict()
        self._lock = threading.Lock()

    # A copy records for itself.
    def __deepcopy__(self, memo: object) -> Replays:
        return Replays()

    def __reduce__(self) -> tuple[Any, ...]:
        return Replays, ()

    @property
    def kept(self) -> list[Recording]:
        """All recordings, the one that was used last at the end."""
        return [k.recording for k in self._kinds.values() if k.recording is not None]

    def session(
        self,
        energy: Energy,
        check: Callable[[Sequence[Tensor]], None],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        key: Hashable,
        held: object,
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
        held
            What the key names by its identity.
        """
        kinds = {(t.dtype, t.device) for t in inputs}
        if len(kinds) != 1 or _has_tangents(inputs):
            return None
        precision = torch.get_float32_matmul_precision()
        whole = key, kinds.pop(), precision, tuple(t.shape for t in inputs)
        session = Session(self, energy, check, inputs, tuple(needed), whole, held)
        return session if session.is_recorded() else None

    def recording(
        self, key: Hashable, function: Function, inputs: Sequence[Tensor], held: object
    ) -> Recording | None:
        """The recording of this name, made if it is time for it."""
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None:
                kind = self._kinds[key] = _Kind(held)
                if len(self._kinds) > _KINDS:
                    self._kinds.popitem(last=False)
            self._kinds.move_to_end(key)
            if kind.recording is not None or kind.waits is None:
                return kind.recording
            if kind.waits:
                kind.waits -= 1
                return None
            # Others do not wait meanwhile.
            kind.put_off()
        try:
            made = Recording(function, inputs)
        except NotRecordableError as error:
            if error.__cause__ is not None:
                # Not for want of lists: it never can be.
                kind.waits = None
            return None
        with self._lock:
            kind.recording = made
            others = [k for k in self._kinds.values() if k.recording is not None]
            for other in others[:-_MOST]:
                other.put_off()
        return made

    def forget(self, key: Hashable) -> None:
        """Throw a recording away that cannot be renewed."""
        with self._lock:
            if key in self._kinds:
                self._kinds[key].put_off()


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
        held: object,
    ) -> None:
        self._replays, self.function, self._check = replays, energy, check
        self._inputs, self.needed, self._key = inputs, needed, (key, needed)
        self._held = held
        self._recording: Recording | None = None

    def energy(self) -> Tensor:
        """The energy ``(1,)``, differentiable in the inputs that need it."""
        apply: Any = _Energy.apply
        result: Tensor = apply(self, *self._inputs)
        return result

    # Energy and slopes ------------------------------------------------------------------------

    def is_recorded(self) -> bool:
        """Whether there is a recording of the energy and its slopes."""
        self._recording = self._recording_of(self._key, self._first, self._inputs)
        return self._recording is not None

    def first(self) -> Outputs:
        """The energy, then its slopes in the inputs that need them."""
        return self._found(self._recording, self._key, self._first, self._inputs)

    def _recording_of(
        self, key: Hashable, function: Function, every: Sequence[Tensor]
    ) -> Recording | None:
        return self._replays.recording(key, function, every, self._held)

    def _found(
        self,
        recording: Recording | None,
        key: Hashable,
        function: Function,
        every: Sequence[Tensor],
    ) -> Outputs:
        """What a function of the inputs, and maybe of more tensors, returns."""
        if recording is not None:
            found = recording(every, lambda: self._check(self._inputs))
            if found is not None:
                return found
            self._replays.forget(key)
        return Outputs.of(function(every))

    def _first(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            leaves = _leaves(inputs, self.needed)
            energy = self.function(leaves)
            return [energy, *_slopes(energy, _chosen(leaves, self.needed))]

    # Second derivatives -----------------------------------------------------------------------

    def second(
        self,
        given: tuple[bool, ...],
        wanted: tuple[bool, ...],
        inputs: Sequence[Tensor],
        directions: Sequence[Tensor],
    ) -> Outputs:
        """Derivatives in what is wanted of slopes along the directions that are given."""
        n = len(inputs)

        def products(tensors: Sequence[Tensor]) -> list[Tensor]:
            with torch.enable_grad():
                leaves = _leaves(tensors[:n], self.needed)
            return self.products(given, wanted, leaves, tensors[n:])

        key, every = (self._key, given, wanted), [*inputs, *directions]
        return self._found(self._recording_of(key, products, every), key, products, every)

    def products(
        self,
        given: Sequence[bool],
        wanted: Sequence[bool],
        leaves: Sequence[Tensor],
        directions: Sequence[Tensor],
        *,
        graph: bool = False,
    ) -> list[Tensor]:
        """The same by torch."""
        with torch.enable_grad():
            slopes = _slopes(self.function(leaves), _chosen(leaves, given), graph=True)
            live = [(s, d) for s, d in zip(slopes, directions, strict=True) if s.requires_grad]
            chosen = _chosen(leaves, wanted)
            if not live or not chosen:
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
    """Inputs without their graphs, as views, since nodes of leaves complain of many streams."""
    leaves = [t.detach().requires_grad_(on) for t, on in zip(inputs, needed, strict=True)]
    return [t.view_as(t) for t in leaves]


def _seen(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs with their graphs, as views: one may depend on another, but slopes are partial."""
    with torch.enable_grad():
        return [t.view_as(t) for t in inputs]


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


def _spread(values: Sequence[Tensor | None], flags: Sequence[bool]) -> list[Tensor | None]:
    """Values where flags are set, None elsewhere."""
    rest = iter(values)
    return [next(rest) if on else None for on in flags]


def _in_batch(tensors: Sequence[Tensor]) -> bool:
    """Whether a transform, or ``is_grads_batched``, has made batches of tensors."""
    return under_transform() or in_older_batch(tensors)


class _Energy(torch.autograd.Function):
    """``(session, *inputs) -> (1,)``."""

    @staticmethod
    def forward(ctx: Any, session: Session, *inputs: Tensor) -> Tensor:
        ctx.session, ctx.found = session, session.first()
        ctx.save_for_backward(*inputs)
        energy: Tensor = ctx.found.flat[:1].clone()
        return energy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (weight,) = grad_outputs
        needed = ctx.session.needed
        if torch.is_grad_enabled():
            asked = asked_for(ctx, needed)
            if _in_batch([weight]):
                # In a batch of weights: by torch operations from here on.
                inputs = _seen(ctx.saved_tensors)
                slopes = _slopes(ctx.session.function(inputs), _chosen(inputs, asked), graph=True)
                return (None, *_spread([weight.reshape(()) * s for s in slopes], asked))
            known = _spread(list(ctx.found.views())[1:], needed)
            apply: Any = _Slopes.apply
            found = apply(
                ctx.session,
                asked,
                [s for s, on in zip(known, asked, strict=True) if on],
                weight,
                *ctx.saved_tensors,
            )
            return (None, *_spread(found, asked))
        return (None, *_spread(ctx.found.times(weight)[1:], needed))


class _Slopes(torch.autograd.Function):
    """``(session, asked, slopes, weight, *inputs)``: slopes times a weight ``(1,)``.

    Slopes are those in the inputs that are asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        session: Session,
        asked: tuple[bool, ...],
        slopes: list[Tensor],
        weight: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.session, ctx.asked, ctx.slopes = session, asked, slopes
        ctx.save_for_backward(weight, *inputs)
        ctx.set_materialize_grads(False)
        number = weight.reshape(())
        return tuple(number * slope for slope in slopes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        session: Session = ctx.session
        of_weight, *flags = asked_for(ctx, ctx.needs_input_grad[3:])
        wanted = tuple(a and b for a, b in zip(flags, session.needed, strict=True))
        every = _spread(grad_outputs, ctx.asked)
        given = tuple(g is not None for g in every)
        directions = [g for g in every if g is not None]
        slopes = [s for s, g in zip(ctx.slopes, grad_outputs, strict=True) if g is not None]
        graph = torch.is_grad_enabled()
        if graph or _in_batch(directions) or not may_replay(inputs[0]):
            # A third derivative may be on its way: by torch operations from here on.
            inputs = _seen(inputs)
            products = session.products(given, wanted, inputs, directions, graph=graph)
            found = [p * weight.reshape(()) for p in products]
            if of_weight and graph:
                slopes = _slopes(session.function(inputs), _chosen(inputs, given), graph=True)
        elif any(wanted) and directions:
            found = session.second(given, wanted, inputs, directions).times(weight)
        else:
            found = [torch.zeros_like(t) for t in _chosen(inputs, wanted)]
        change = None
        if of_weight and directions:
            sums = [(s * d).sum() for s, d in zip(slopes, directions, strict=True)]
            change = torch.stack(sums).sum().reshape(weight.shape)
        return (None, None, None, change, *_spread(found, wanted))
