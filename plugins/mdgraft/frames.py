"""Configurations of a system: positions, boxes, velocities."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames:
    """A batch of F configurations of N particles.

    Attributes
    ----------
    positions
        ``(F, N, 3)`` [nm].
    box
        ``(F, 3, 3)`` box vectors as rows [nm], or None for an open system.
    velocities
        ``(F, N, 3)`` [nm/ps], or None.
    sampled
        The ensemble that the frames were drawn from: ``"NVT"``, ``"NPT"``, ``"NVE"``, or None
        when unknown.

    Raises
    ------
    InvalidInputError
        If shapes disagree or a number is not finite.
    """

    positions: Tensor
    box: Tensor | None = None
    velocities: Tensor | None = None
    sampled: str | None = None

    def __post_init__(self) -> None:
        for name, tensor in self._tensors().items():
            if not (torch.is_tensor(tensor) and tensor.is_floating_point()):
                kind = tensor.dtype if torch.is_tensor(tensor) else type(tensor).__name__
                raise InvalidInputError(
                    f"{name}: got {kind}, wanted a tensor of floating-point numbers; "
                    "torch.as_tensor(array, dtype=torch.float64) makes one"
                )
        if self.positions.ndim != 3 or self.positions.shape[-1] != 3:
            raise InvalidInputError(
                f"positions: got shape {tuple(self.positions.shape)}, wanted (frames, N, 3)"
            )
        if self.box is not None and self.box.shape != (len(self), 3, 3):
            raise InvalidInputError(
                f"box: got shape {tuple(self.box.shape)}, wanted ({len(self)}, 3, 3)"
            )
        if self.velocities is not None and self.velocities.shape != self.positions.shape:
            raise InvalidInputError(
                f"velocities: got shape {tuple(self.velocities.shape)}, "
                f"wanted {tuple(self.positions.shape)}"
            )
        if self.sampled not in (None, "NVT", "NPT", "NVE"):
            raise InvalidInputError(
                f"sampled: got {self.sampled!r}, wanted 'NVT', 'NPT', 'NVE' or None"
            )
        for name, tensor in self._tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidInputError(f"{name}: holds NaN or infinity")

    def _tensors(self) -> dict[str, Tensor]:
        found = {"positions": self.positions, "box": self.box, "velocities": self.velocities}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __len__(self) -> int:
        return int(self.positions.shape[0])

    @property
    def n_particles(self) -> int:
        """Number of particles N."""
        return int(self.positions.shape[1])

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Frames:
        """Select frames; an integer must be wrapped in a list or slice."""
        if isinstance(index, int):
            raise InvalidInputError(
                f"index: got {index}, wanted a slice or a list such as [{index}]"
            )
        parts = {name: tensor[index] for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **parts)  # type: ignore[arg-type]

    def batches(self, size: int) -> Iterator[Frames]:
        """Split into batches of at most ``size`` frames, in order."""
        if size < 1:
            raise InvalidInputError(f"size: got {size}, wanted at least 1 frame")
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Frames:
        """Change precision or device."""
        parts = {name: t.to(dtype=dtype, device=device) for name, t in self._tensors().items()}
        return dataclasses.replace(self, **parts)  # type: ignore[arg-type]

    @staticmethod
    def concatenate(parts: Sequence[Frames]) -> Frames:
        """Join batches of the same system; all must have, or all lack, a box and velocities."""
        if not parts:
            raise InvalidInputError("parts: got no frames to concatenate")
        first = parts[0]
        for part in parts:
            if part._tensors().keys() != first._tensors().keys() or part.sampled != first.sampled:
                raise InvalidInputError(
                    "parts: all must have the same fields and the same sampled ensemble"
                )
            if part.n_particles != first.n_particles:
                raise InvalidInputError(
                    f"parts: {part.n_particles} and {first.n_particles} particles cannot be joined"
                )
        joined = {
            name: torch.cat([part._tensors()[name] for part in parts]) for name in first._tensors()
        }
        return dataclasses.replace(first, **joined)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Write a NumPy ``.npz`` file with the arrays by name."""
        arrays: dict[str, Any] = {
            name: tensor.detach().cpu().numpy() for name, tensor in self._tensors().items()
        }
        with open(path, "wb") as stream:
            np.savez(stream, sampled=np.array(self.sampled or ""), **arrays)

    @staticmethod
    def load(path: str | Path) -> Frames:
        """Read what `save` wrote; any other file raises `InvalidInputError`."""
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            sampled = str(arrays.pop("sampled")) or None
            return Frames(**{n: torch.from_numpy(a) for n, a in arrays.items()}, sampled=sampled)
        except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(
                f"path: {path} does not hold what Frames.save writes ({error})"
            ) from error
