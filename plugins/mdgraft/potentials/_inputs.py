"""Checks of what a user hands to a potential."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, MissingBoxError
from mdgraft._units import NANOMETER, plain
from mdgraft.kernels.observe import observe

if TYPE_CHECKING:
    from mdgraft.potentials.potential import Potential


def as_frames(
    potential: Potential, positions: Any, box: Any
) -> tuple[Tensor, Tensor | None, torch.Size]:
    """Bring positions and box to ``(F, N, 3)`` and ``(F, 3, 3)``; return the leading shape too."""
    like = potential._like
    x = _recordable(_as_tensor("positions", positions, like))
    n = potential.n_particles
    if x.ndim < 2 or x.shape[-2:] != (n, 3):
        raise InvalidInputError(
            f"positions: got shape {tuple(x.shape)}, wanted (..., {n}, 3) for {n} particles"
        )
    leading = x.shape[:-2]
    frames = x.reshape(leading.numel(), n, 3)
    if box is None:
        if potential.periodic:
            raise MissingBoxError(
                "box: got None, but this potential is periodic; pass box vectors of shape "
                "(3, 3) or (..., 3, 3) in nm, for instance state.getPeriodicBoxVectors()"
            )
        return frames, None, leading
    cell = _recordable(_as_tensor("box", box, like))
    if cell.ndim < 2 or cell.shape[-2:] != (3, 3):
        hint = "; use torch.diag(lengths) for a rectangular box" if cell.shape[-1:] == (3,) else ""
        raise InvalidInputError(
            f"box: got shape {tuple(cell.shape)}, wanted (..., 3, 3) with box vectors as rows{hint}"
        )
    try:
        cells = cell.expand(*leading, 3, 3)
    except RuntimeError:
        raise InvalidInputError(
            f"box: leading shape {tuple(cell.shape[:-2])} does not broadcast to that of the "
            f"positions, {tuple(leading)}"
        ) from None
    return frames, cells.reshape(-1, 3, 3), leading


def _recordable(tensor: Tensor) -> Tensor:
    """Autograd cannot keep tensors of inference mode outside of it."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return tensor.clone()
    return tensor


def _as_tensor(name: str, value: Any, like: Tensor) -> Tensor:
    if type(value) is Tensor and value.dtype == like.dtype and value.device == like.device:
        return value
    try:
        numbers = plain(value, NANOMETER)
        if isinstance(numbers, list | tuple):
            # Torch would round Python's numbers to its default precision, which is single.
            numbers = np.asarray(numbers)
        tensor = torch.as_tensor(numbers, device=None if torch.is_tensor(value) else like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{name}: cannot be read as numbers in nm ({error})") from error
    if tensor.device != like.device:
        raise InvalidInputError(
            f"{name}: is on {tensor.device}, the potential on {like.device}; move one with .to()"
        )
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InvalidInputError(f"{name}: got dtype {tensor.dtype}, wanted real numbers")
    return tensor.to(like.dtype)


def check_frames(frames: Tensor, cells: Tensor | None, *, reduced: bool = True) -> None:
    """Raise for NaN, infinity, or a box without volume or, if it must be, not in reduced form."""

    def positions_are_finite(x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            f, atom, _ = (~torch.isfinite(x)).nonzero()[0].tolist()
            raise InvalidInputError(
                f"positions: NaN or infinity at particle {atom} of frame {f}; "
                "check the trajectory or the step before"
            )
        return torch.empty(0, dtype=torch.long, device=x.device)

    def box_is_reduced(h: Tensor) -> Tensor:
        if not bool(torch.isfinite(h).all()):
            raise InvalidInputError("box: holds NaN or infinity")
        if not reduced:
            return spans_a_volume(h)
        diagonal = h.diagonal(dim1=-2, dim2=-1)
        negative = (diagonal <= 0).any(dim=-1)
        if bool(negative.any()):
            raise InvalidInputError(
                f"box: diagonal {diagonal[negative][0].tolist()} must be positive; "
                "rows are box vectors"
            )
        slack = 1e-5 * diagonal.amax(dim=-1, keepdim=True)
        upper = h[:, (0, 0, 1), (1, 2, 2)].abs()
        lower = h[:, (1, 2, 2), (0, 0, 1)].abs() - 0.5 * diagonal[:, (0, 0, 1)]
        oblique = ((upper > slack) | (lower > slack)).any(dim=-1)
        if bool(oblique.any()):
            raise InvalidInputError(
                f"box: {h[oblique][0].tolist()} is not in reduced form; the first vector must "
                "lie along x, the second in the xy plane, and off-diagonal elements must not "
                "exceed half of the diagonal "
                "(openmm.app.internal.unitcell.reducePeriodicBoxVectors reduces it)"
            )
        return torch.empty(0, dtype=torch.long, device=h.device)

    def spans_a_volume(h: Tensor) -> Tensor:
        flat = torch.linalg.det(h.double()).abs() <= 1e-9 * h.double().norm(dim=-1).prod(dim=-1)
        if bool(flat.any()):
            raise InvalidInputError(
                f"box: {h[flat][0].tolist()} spans no volume; wanted three linearly independent "
                "vectors, also where a direction is not periodic"
            )
        return torch.empty(0, dtype=torch.long, device=h.device)

    def nothing(result: Tensor, n_frames: int) -> Tensor:
        return result

    observe(positions_are_finite, nothing, frames)
    if cells is not None:
        observe(box_is_reduced, nothing, cells)
