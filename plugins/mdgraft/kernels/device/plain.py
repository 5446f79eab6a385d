"""Plain torch forms with the interface of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdgraft.kernels.kernel import Inputs, PerFrame
from mdgraft.kernels.third_order import empty_per_frame, slope_along


class PlainKernel:
    """A kernel, see `mdgraft.kernels.kernel.Kernel`, that differentiates a plain torch form.

    Parameters
    ----------
    reference
        ``(*inputs) -> (F,)``.
    framed
        Inputs beside positions and box that differ between frames.
    """

    fused = True

    def __init__(self, reference: Callable[..., Tensor], framed: tuple[int, ...]) -> None:
        self.reference: Callable[..., Tensor] | None = reference
        self._form, self.framed = reference, framed

    def energies(self, inputs: Inputs) -> Tensor:
        """Energies ``(F,)``."""
        return self._form(*inputs)

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor, PerFrame]:
        """Energies, and derivatives of each frame's energy."""
        return self.energies(inputs), self._each(inputs, wanted, [])

    def products(
        self, inputs: Inputs, directions: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> PerFrame:
        """Second derivatives times directions."""
        return self._each(inputs, wanted, directions)

    def _each(
        self, inputs: Inputs, wanted: Sequence[bool], directions: Sequence[Tensor | None]
    ) -> PerFrame:
        """Derivatives of each frame's energy or, with directions, of its slope along them."""
        framed = [k < 2 or k in self.framed for k in range(len(inputs))]
        found = []
        for f in range(inputs[0].shape[0]):
            frame = tuple(t[f : f + 1] if own else t for t, own in zip(inputs, framed, strict=True))
            function: Callable[..., Tensor] = self._total
            every = tuple(range(len(frame)))
            if directions:
                moves = [
                    torch.zeros_like(t) if d is None else d[f].reshape(t.shape)
                    for d, t in zip(directions, frame, strict=True)
                ]
                function = slope_along(torch.func.grad(function, argnums=every), moves)
            found.append(torch.func.grad(function, argnums=every)(*frame))
        if not found:
            columns = empty_per_frame(inputs, framed)
        else:
            columns = [
                torch.cat(column) if own else torch.stack(column)
                for column, own in zip(zip(*found, strict=True), framed, strict=True)
            ]
        return [t if on else None for t, on in zip(columns, wanted, strict=True)]

    def _total(self, *inputs: Tensor) -> Tensor:
        return self._form(*inputs).sum()
