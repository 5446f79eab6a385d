"""Whether compiled kernels are used where there are any."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

_PLAIN = contextvars.ContextVar("_PLAIN", default=os.environ.get("MDGRAFT_KERNELS") == "plain")
#: Below this number of particles compiling what users wrote takes longer than it saves.
_SMALLEST = contextvars.ContextVar("_SMALLEST", default=24)
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
    if _PLAIN.get() or not _AVAILABLE or tensor.device.type != "cpu":
        return False
    if tensor.dtype not in (torch.float32, torch.float64):
        return False
    if _nested_derivatives() > 2:
        # Kernels would hand these on to plain operations, and not in every order of modes.
        return False
    # Graphs that torch records must consist of operations that it knows.
    return not (torch._C._get_tracing_state() is not None or torch.compiler.is_compiling())


def _nested_derivatives() -> int:
    """How many derivatives of `torch.func` are being taken at once."""
    try:
        stack = torch._C._functorch.get_interpreter_stack() or []
        return sum(str(level.key()) in _DERIVATIVES for level in stack)
    except AttributeError:
        # Not a public function: without it, kernels raise where they cannot help.
        return 0


_DERIVATIVES = ("TransformType.Grad", "TransformType.Jvp")
