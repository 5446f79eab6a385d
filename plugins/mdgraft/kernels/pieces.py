"""Derivatives that kernels find, kept frame by frame instead of summed."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

from torch import Tensor

from mdgraft.kernels.kernel import Kernel, PerFrame


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a kernel contributed to an energy: a leaf of its graph, and where it came from.

    Attributes
    ----------
    energies
        ``(F,)``, a leaf.
    inputs
        The kernel's inputs, with their graphs.
    gradients
        Derivatives of each frame's energy in those inputs that have graphs.
    framed
        Whether each input has a frame axis.
    """

    energies: Tensor
    inputs: tuple[Tensor, ...]
    gradients: PerFrame
    framed: tuple[bool, ...]


class Pieces(list[Piece]):
    """What all kernels contributed."""

    def add(self, kernel: Kernel, inputs: tuple[Tensor, ...]) -> Tensor:
        """Evaluate a kernel; returns its energies."""
        wanted = [t.requires_grad and t.numel() > 0 for t in inputs]
        plain = [t.detach() for t in inputs]
        energies, gradients = kernel.gradients(plain, wanted)
        if energies is None:
            energies = kernel.energies(plain)
        leaf = energies.requires_grad_(any(wanted))
        framed = tuple(k < 2 or k in kernel.framed for k in range(len(inputs)))
        self.append(Piece(leaf, inputs, gradients, framed))
        return leaf


@contextlib.contextmanager
def collected() -> Iterator[list[Piece]]:
    """Keep the derivatives that kernels find inside this context, frame by frame.

    Energies that are computed inside have graphs that end where kernels begin. Not for use with
    transforms of ``torch.func``.
    """
    pieces = Pieces()
    token = COLLECTED.set(pieces)
    try:
        yield pieces
    finally:
        COLLECTED.reset(token)


def collecting() -> bool:
    """Whether derivatives are being kept by `collected`."""
    return COLLECTED.get() is not None


COLLECTED: contextvars.ContextVar[Pieces | None] = contextvars.ContextVar("COLLECTED", default=None)
