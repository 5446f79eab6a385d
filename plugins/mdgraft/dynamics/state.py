"""Positions and velocities between two steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.kernels.observe import observe

#: ``(positions (..., N, 3), box | None) -> (..., N, 3)`` [kJ/mol/nm], such as `Potential.forces`.
Forces: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Where a step of dynamics begins or ends.

    Attributes
    ----------
    positions
        ``(..., N, 3)`` [nm]; they meet the constraints.
    velocities
        ``(..., N, 3)`` [nm/ps].
    forces
        ``(..., N, 3)`` [kJ/mol/nm] at these positions, for methods that need them twice; None
        when they are not known.
    """

    positions: Tensor
    velocities: Tensor
    forces: Tensor | None = None


def checked(name: str, value: float | Tensor, like: Tensor, *, zero: bool = False) -> Tensor:
    """A number as a scalar tensor; raise unless it is positive, or zero where that is allowed.

    Raises
    ------
    InvalidInputError
        If it is negative, not finite, or zero where its derivative is asked for.
    """
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if tensor.ndim:
        raise InvalidInputError(f"{name}: got shape {tuple(tensor.shape)}, wanted one number")
    allowed = zero and not tensor.requires_grad

    def check(plain: Tensor) -> Tensor:
        low = plain.min()
        if not (bool(torch.isfinite(plain).all()) and float(low) >= 0.0 and (allowed or low > 0)):
            wanted = "wanted a positive number" + (
                "; at zero its derivative does not exist" if zero and not allowed else ""
            )
            raise InvalidInputError(f"{name}: got {float(low):g}, {wanted}")
        return plain.new_empty(0)

    observe(check, lambda result, _: result, tensor.reshape(1))
    return tensor
