"""What computes energies outside torch: the interface of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

#: Positions ``(F, N, 3)``, box ``(F, 3, 3)`` (``(F, 0, 3)`` in an open system), then parameters of
#: any shape, which all frames share.
Inputs = Sequence[Tensor]
#: For each input a derivative of every frame, ``(F, *shape)``; None where it is not wanted.
PerFrame = list[Tensor | None]


class Kernel(Protocol):
    """What computes energies. Tensors come without a graph and unwrapped; results are new."""

    #: Whether many frames cost less in one call, and first derivatives little beside energies.
    fused: bool
    #: Inputs beside positions and box that differ between frames, ``(F, *shape)``, by place.
    framed: tuple[int, ...]
    #: A plain torch form ``(*inputs) -> (F,)`` for derivatives beyond the second, or None.
    reference: Callable[..., Tensor] | None

    def energies(self, inputs: Inputs) -> Tensor:
        """Energies ``(F,)`` [kJ/mol]."""

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor | None, PerFrame]:
        """Energies, if they come for free, and their derivatives in the inputs that are wanted."""

    def products(
        self, inputs: Inputs, directions: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> PerFrame:
        """Second derivatives times directions ``(F, *shape)``, summed over all directions.

        A direction that is None is zero.
        """
