"""Whether compiled kernels are used where there are any."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

_PLAIN = contextvars.ContextVar("_PLAIN", default=False)
_AVAILABLE = importlib.util.find_spec("numba") is not None


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Evaluate everything by plain torch operations inside this context.

    They are the reference for the compiled kernels, differentiable to every order and in every
    mode, and several times slower.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def compiled_kernels(tensor: Tensor) -> bool:
    """Whether compiled kernels may evaluate this tensor."""
    if _PLAIN.get() or not _AVAILABLE or tensor.device.type != "cpu":
        return False
    if tensor.dtype not in (torch.float32, torch.float64):
        return False
    # Graphs that torch records must consist of operations that it knows.
    return not (torch._C._get_tracing_state() is not None or torch.compiler.is_compiling())
