"""Shapes and types that are used everywhere; F frames, N particles."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from torch import Tensor

from mdgraft.frames import Frames

#: ``(..., N, 3)`` positions [nm]: a tensor, an array, or a quantity with a length unit.
PositionsLike: TypeAlias = Any
#: ``(..., 3, 3)`` box vectors as rows [nm], or None for an open system.
BoxLike: TypeAlias = Any


class Observable(Protocol):
    """A quantity with one value, of any shape, in each frame."""

    def __call__(self, frames: Frames) -> Tensor:
        """Map F frames to a tensor of shape ``(F, ...)``."""
