"""Checks of what a user hands to a set of constraints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, MissingBoxError
from mdgraft._units import NANOMETER, plain
from mdgraft.kernels.observe import observe
from mdgraft.potentials._inputs import check_frames


def as_numbers(name: str, values: Any, unit: str) -> Tensor:
    """Numbers or quantities as a new, flat tensor without a graph; double unless they are single.

    Raises
    ------
    InvalidInputError
        If they are none, or have another unit.
    """
    try:
        numbers = plain(values, unit)
        if isinstance(numbers, list | tuple):
            numbers = np.asarray(numbers)
        tensor = torch.as_tensor(numbers).detach()
        tensor = tensor if tensor.is_floating_point() else tensor.double()
        return tensor.reshape(-1).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{name}: cannot be read as numbers in {unit} ({error})") from error


def check_structure(pairs: np.ndarray, lengths: Tensor, masses: Tensor) -> None:
    """Raise `InvalidInputError` for pairs, lengths or masses that no system can have."""
    n = len(masses)
    if len(pairs) != len(lengths):
        raise InvalidInputError(f"lengths: got {len(lengths)}, wanted one for {len(pairs)} pairs")
    if not bool((torch.isfinite(masses) & (masses >= 0)).all()):
        raise InvalidInputError("masses: one is negative or not finite; wanted Da, or zero")
    check_positive("lengths", lengths, "nm")
    seen: set[tuple[int, int]] = set()
    for k, (i, j) in enumerate(pairs.tolist()):
        where = f"pairs: constraint {k} connects particles {i} and {j}"
        if not (0 <= i < n and 0 <= j < n):
            raise InvalidInputError(f"{where}, but there are {n} particles")
        if i == j:
            raise InvalidInputError(f"{where}; wanted two different ones")
        if (min(i, j), max(i, j)) in seen:
            raise InvalidInputError(f"{where}, as another one does; keep one of them")
        if masses[i] == 0 and masses[j] == 0:
            raise InvalidInputError(
                f"{where}, which both have no mass and cannot move; leave this constraint out"
            )
        seen.add((min(i, j), max(i, j)))


def check_positive(name: str, values: Tensor, unit: str) -> None:
    """Raise `InvalidInputError` unless all values are positive and finite."""

    def check(plain_values: Tensor) -> Tensor:
        bad = ~((plain_values > 0) & torch.isfinite(plain_values))
        if bool(bad.any()):
            k = bad.nonzero()[0].tolist()
            raise InvalidInputError(
                f"{name}: entry {k[-1]} is {float(plain_values[tuple(k)]):g} {unit}, wanted a "
                "positive number"
            )
        return plain_values.new_empty(0)

    if values.numel():
        observe(check, lambda result, _: result, values.unsqueeze(0))


#: What quantities have to convert to; others are taken as they are.
_UNITS = {"positions": NANOMETER, "reference": NANOMETER, "box": NANOMETER, "lengths": NANOMETER}


def as_tensor(name: str, value: Any, like: Tensor) -> Tensor:
    """Numbers, arrays or quantities as a tensor of the same precision and device."""
    try:
        numbers = plain(value, _UNITS.get(name))
        if isinstance(numbers, list | tuple):
            numbers = np.asarray(numbers)
        tensor = torch.as_tensor(numbers)
        if tensor.is_complex():
            raise TypeError(f"dtype {tensor.dtype}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{name}: cannot be read as real numbers ({error})") from error
    return tensor.to(device=like.device, dtype=like.dtype)


def joint_frames(
    named: Mapping[str, Any], box: Any, *, like: Tensor, n_particles: int, periodic: bool
) -> tuple[list[Tensor], Tensor | None, torch.Size]:
    """Bring tensors ``(..., N, 3)`` to ``(F, N, 3)``, and a box ``(..., 3, 3)`` to ``(F, 3, 3)``.

    Leading shapes are broadcast against each other; their common shape is returned as well.
    """
    tensors = {name: as_tensor(name, value, like) for name, value in named.items()}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.shape[-2:] != (n_particles, 3):
            raise InvalidInputError(
                f"{name}: got shape {tuple(tensor.shape)}, wanted (..., {n_particles}, 3)"
            )
    if box is None and periodic:
        raise MissingBoxError(
            "box: got None, but constraints or virtual sites are periodic; pass box vectors of "
            "shape (3, 3) or (..., 3, 3) in nm"
        )
    if box is not None:
        tensors["box"] = as_tensor("box", box, like)
        if tensors["box"].ndim < 2 or tensors["box"].shape[-2:] != (3, 3):
            raise InvalidInputError(
                f"box: got shape {tuple(tensors['box'].shape)}, wanted (..., 3, 3)"
            )
    shapes = {name: tuple(tensor.shape[:-2]) for name, tensor in tensors.items()}
    try:
        leading = torch.Size(np.broadcast_shapes(*shapes.values()))
    except ValueError:
        raise InvalidInputError(
            f"{', '.join(shapes)}: leading shapes {shapes} do not broadcast; wanted the same "
            "number of frames in each, or one"
        ) from None
    frames = {
        name: t.expand(*leading, *t.shape[-2:]).reshape(leading.numel(), *t.shape[-2:])
        for name, t in tensors.items()
    }
    cells = frames.pop("box", None)
    for name, tensor in frames.items():
        check_finite(name, tensor)
    if cells is not None:
        check_frames(next(iter(frames.values())), cells, reduced=False)
    return list(frames.values()), cells, leading


def check_finite(name: str, frames: Tensor) -> None:
    """Raise `InvalidInputError` for NaN or infinity in ``(F, N, 3)``."""

    def check(plain_values: Tensor) -> Tensor:
        if not bool(torch.isfinite(plain_values).all()):
            f, particle, _ = (~torch.isfinite(plain_values)).nonzero()[0].tolist()
            raise InvalidInputError(
                f"{name}: NaN or infinity at particle {particle} of frame {f}; "
                "check the step before"
            )
        return plain_values.new_empty(0)

    observe(check, lambda result, _: result, frames)
