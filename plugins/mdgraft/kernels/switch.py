"""Whether compiled kernels are used where there are any."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

_PLAIN = contextvars.ContextVar("_PLAIN", default=os.environ.get("MDGRAFT_KERNELS") == "plain")
#: Below this number of particles compiling what users wrote takes longer than it saves.
_SMALLEST = contextvars.ContextVar("_SMALLEST", default=24)
#: Whether tensors on CPUs are taken for those of a device, whose programs are interpreted then.
_EMULATED = contextvars.ContextVar("_EMULATED", default=False)
_AVAILABLE = importlib.util.find_spec("numba") is not None


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Evaluate everything by plain torch operations inside this context.

    They are the reference for the compiled kernels, differentiable to every order and in every
    mode, and several times slower. The environment variable ``MDGRAFT_KERNELS=plain`` does the
    same for a whole process.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


@contextlib.contextmanager
def compiled_from(n_particles: int) -> Iterator[None]:
    """Compile expressions of users for systems of at least so many particles in this context."""
    token = _SMALLEST.set(n_particles)
    try:
        yield
    finally:
        _SMALLEST.reset(token)


def compiled_kernels(tensor: Tensor, *, n_particles: int | None = None) -> bool:
    """Whether compiled kernels may evaluate this tensor.

    Parameters
    ----------
    tensor
        Positions.
    n_particles
        How many particles there are, if the kernel is still to be made from what users wrote.
    """
    if n_particles is not None and n_particles < _SMALLEST.get():
        return False
    if _PLAIN.get() or not _AVAILABLE:
        return False
    if tensor.device.type != "cpu" and not on_device(tensor):
        return False
    if tensor.dtype not in (torch.float32, torch.float64):
        return False
    if _nested_derivatives() > 2:
        # Kernels would hand these on to plain operations, and not in every order of modes.
        return False
    # Graphs that torch records must consist of operations that it knows.
    return not (torch._C._get_tracing_state() is not None or torch.compiler.is_compiling())


@contextlib.contextmanager
def emulated_device() -> Iterator[None]:
    """Take tensors on CPUs for those of a GPU in this context.

    For tests, on machines without one: Triton must be told to interpret programs, by the
    environment variable ``TRITON_INTERPRET=1``, before it is imported.
    """
    token = _EMULATED.set(True)
    try:
        yield
    finally:
        _EMULATED.reset(token)


def on_device(tensor: Tensor) -> bool:
    """Whether the compiled kernels for this tensor are those for GPUs, and there are any."""
    if tensor.device.type == "cpu":
        return _EMULATED.get()
    return tensor.device.type == "cuda" and _has_triton()


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    return torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


def under_transform() -> bool:
    """Whether a transform of `torch.func` is at work."""
    try:
        return bool(torch._C._functorch.get_interpreter_stack())
    except AttributeError:
        # Not a public function. What transforms can enter is right without them too.
        return True


def _nested_derivatives() -> int:
    """How many derivatives of `torch.func` are being taken at once."""
    try:
        stack = torch._C._functorch.get_interpreter_stack() or []
        return sum(str(level.key()) in _DERIVATIVES for level in stack)
    except AttributeError:
        # Not a public function: without it, kernels raise where they cannot help.
        return 0


_DERIVATIVES = ("TransformType.Grad", "TransformType.Jvp")
