"""Evaluations that are recorded once and replayed as one CUDA graph.

An evaluation is several hundred operations, each of which takes longer to start than to run. What
is replayed starts all of them at once, from the same places in memory. It has to notice by itself
that it no longer holds: conditions, such as that neighbour lists are still good, are part of the
recording, and their outcome is the only number that the host waits for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

#: ``(inputs) -> outputs``, on the device of the inputs and without waiting for it.
Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class NotRecordableError(Exception):
    """An evaluation cannot be recorded: it waits for the device, or not yet has its lists."""


class Renewable(Protocol):
    """What a recording reads beside its inputs, and can be brought up to date."""

    def renew(self, positions: Tensor, box: Tensor | None) -> bool:
        """Bring it up to date in place; false if there is no room."""


class Recorder:
    """What an evaluation that is being recorded depends on beside its inputs.

    Parameters
    ----------
    stream
        On which it begins and ends; None on CPUs, for tests.
    box
        That was checked last.
    """

    def __init__(self, stream: torch.cuda.Stream | None, box: Tensor) -> None:
        #: All that it runs on.
        self.streams = None if stream is None else {stream.cuda_stream}
        self.thread = threading.get_ident()
        self._checked = _Checked(box)
        self.conditions: list[Tensor] = []
        self.renewable: list[tuple[Renewable, Tensor, Tensor | None]] = []

    def require(self, condition: Tensor) -> None:
        """Replay only while this number ``()`` is true."""
        self.conditions.append(condition.reshape(()))

    def require_checked(self, positions: Tensor, box: Tensor | None) -> None:
        """Replay only finite positions in the box that was checked last."""
        self.require((0.0 * positions).sum() == 0)
        if box is not None:
            self.require((box == self._checked.box).all())
            self.depend(self._checked, positions, box)

    def depend(self, lists: Renewable, positions: Tensor, box: Tensor | None) -> None:
        """Renew something by these tensors, which replaying fills, when a condition fails."""
        if all(known is not lists for known, _, _ in self.renewable):
            box = None if box is None else box.detach()
            self.renewable.append((lists, positions.detach(), box))


@dataclasses.dataclass
class _Checked:
    """The box of an evaluation that did not raise."""

    box: Tensor

    def renew(self, positions: Tensor, box: Tensor | None) -> bool:
        """Take another one, which has been checked."""
        if box is not None:
            self.box.copy_(box)
        return True


#: One at a time in a process. Not a context variable: backward passes run in threads of their own.
_ACTIVE: Recorder | None = None
_LOCK = threading.RLock()
#: Recordings of a device share lists, which must not be renewed while another one is replayed.
_REPLAYING: dict[torch.device, threading.RLock] = {}


def recorder(tensor: Tensor) -> Recorder | None:
    """The recorder of the evaluation that a tensor belongs to, if that is being recorded."""
    active = _ACTIVE
    if active is None:
        return None
    if active.streams is None:
        here = tensor.device.type == "cpu" and active.thread == threading.get_ident()
        return active if here else None
    if not tensor.is_cuda:
        return None
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return active if stream in active.streams else None


def side_by_side(
    like: Tensor, parts: Sequence[Callable[[], Tensor]], inputs: Iterable[Tensor]
) -> list[Tensor]:
    """Results of functions that do not need each other.

    While an evaluation on a GPU is recorded they are on streams of their own: most operations are
    much smaller than the device.

    Parameters
    ----------
    like
        A tensor of the evaluation.
    parts
        Each returns a tensor.
    inputs
        What they read of what was made before them.
    """
    active = recorder(like)
    if active is None or active.streams is None:
        return [part() for part in parts]
    main, sides = torch.cuda.current_stream(like.device), []
    read = [t for t in inputs if t.is_cuda]
    results = []
    for part in parts[1:]:
        side = _stream(like.device)
        active.streams.add(side.cuda_stream)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            results.append(part())
        sides.append(side)
        for tensor in read:
            # Its memory must not be used again before this stream has read it.
            tensor.record_stream(side)
    first = parts[0]() if parts else None
    for side, result in zip(sides, results, strict=True):
        main.wait_stream(side)
        result.record_stream(main)
    return results if first is None else [first, *results]


def _stream(device: torch.device) -> torch.cuda.Stream:
    make: Any = torch.cuda.Stream
    stream: torch.cuda.Stream = make(device)
    return stream


@contextlib.contextmanager
def _recorded_by(active: Recorder) -> Iterator[Recorder]:
    global _ACTIVE
    _ACTIVE = active
    try:
        yield active
    finally:
        _ACTIVE = None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Tensors of any shapes, one after the other in memory."""

    flat: Tensor
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Outputs:
        """Copies of tensors."""
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        return cls(flat, tuple(t.shape for t in tensors))

    def times(self, weight: Tensor) -> list[Tensor]:
        """Each of them times a number ``(1,)``."""
        return list(Outputs(self.flat * weight, self.shapes).views())

    def views(self) -> Iterator[Tensor]:
        """Each of them."""
        parts = torch.split(self.flat, [shape.numel() for shape in self.shapes])
        return (p.reshape(shape) for p, shape in zip(parts, self.shapes, strict=True))


class Recording:
    """A function whose operations are replayed.

    Parameters
    ----------
    function
        What to record. It has been called before, so that its programs are compiled.
    inputs
        Positions, box, and others, of the kinds of those it will be replayed for.

    Raises
    ------
    NotRecordableError
        If the function waits for the device, or another one is being recorded.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self._inputs = [t.detach().clone() for t in inputs]
        box = self._inputs[1].clone()
        self._lock = _REPLAYING.setdefault(box.device, threading.RLock())
        # Not waited for: backward passes of all threads share one that this one may wait for.
        if not _LOCK.acquire(blocking=False):
            raise NotRecordableError("another evaluation is being recorded")
        try:
            if box.is_cuda:
                self._record(function, box)
            else:
                self._emulate(function, box)
        finally:
            _LOCK.release()

    def __call__(self, inputs: Sequence[Tensor], check: Callable[[], None]) -> Outputs | None:
        """Outputs for other inputs.

        Parameters
        ----------
        inputs
            As those that were recorded.
        check
            Called if a condition does not hold; raises if the inputs are at fault.

        Returns
        -------
        Outputs or None
            None if this recording cannot be used any more.
        """
        with self._lock, torch.no_grad():
            torch._foreach_copy_(self._inputs, list(inputs))
            self._replay()
            # The host has this done while the device is still at work.
            found = Outputs(self._outputs.clone(), self._shapes)
            if not bool(self._valid):
                check()
                if not all([r.renew(x, h) for r, x, h in self._recorder.renewable]):
                    return None
                self._replay()
                if not bool(self._valid):
                    return None
                found = Outputs(self._outputs.clone(), self._shapes)
        return found

    def _run(self, function: Function, active: Recorder) -> tuple[Tensor, Tensor]:
        """Outputs one after the other, and whether all conditions hold."""
        found = Outputs.of(function(self._inputs))
        self._shapes, outputs = found.shapes, found.flat
        if not active.conditions:
            return outputs, torch.ones((), dtype=torch.bool, device=outputs.device)
        return outputs, torch.stack(active.conditions).all()

    def _record(self, function: Function, box: Tensor) -> None:
        device = box.device
        with torch.cuda.device(device):
            stream, current = _stream(device), torch.cuda.current_stream(device)
            stream.wait_stream(current)
            rehearsal, self._recorder = Recorder(stream, box), Recorder(stream, box)
            with torch.cuda.stream(stream), _recorded_by(rehearsal), _without_waiting():
                self._run(function, rehearsal)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream), _recorded_by(self._recorder), _without_collecting():
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._outputs, self._valid = self._run(function, self._recorder)
                    self._graph.capture_end()
                except BaseException as error:
                    # Also when it is interrupted: the device would record ever after.
                    with contextlib.suppress(RuntimeError):
                        self._graph.capture_end()
                    if isinstance(error, NotRecordableError) or not isinstance(error, Exception):
                        raise
                    raise NotRecordableError(str(error)) from error
            current.wait_stream(stream)
        self._replay = self._graph.replay

    def _emulate(self, function: Function, box: Tensor) -> None:
        """Run the function again instead, into the same memory."""

        def run() -> tuple[Tensor, Tensor]:
            active = Recorder(None, box)
            with _LOCK, _recorded_by(active) as self._recorder, torch.enable_grad():
                return self._run(function, active)

        def replay() -> None:
            outputs, valid = run()
            self._outputs.copy_(outputs)
            self._valid.copy_(valid)

        self._outputs, self._valid = run()
        self._replay = replay


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Garbage may hold other recordings, and a device does not free those while it records."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    """Raise where the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    _set_mode("error")
    try:
        yield
    except RuntimeError as error:
        raise NotRecordableError(str(error)) from error
    finally:
        _set_mode(before)


def _set_mode(mode: int | str) -> None:
    # Torch warns that it does not notice everything; the recording itself does.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
