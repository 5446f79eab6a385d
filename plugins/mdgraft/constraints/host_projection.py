"""Projections that a host computes, with derivatives that it does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from mdgraft._errors import ConstraintError
from mdgraft.constraints.newton import differentiable_limit
from mdgraft.kernels.observe import constant, observe

#: Relative difference of velocities at which the host must have solved other equations.
_OTHER = 1e-2


class HostProjection(Protocol):
    """A host that projects onto constraints. Tensors are float64 or float32, without a graph."""

    def project_positions(self, positions: Tensor) -> Tensor:
        """Positions ``(F, N, 3)`` [nm] that meet the constraints, along their own vectors."""

    def project_velocities(self, velocities: Tensor, positions: Tensor) -> Tensor:
        """Velocities ``(F, N, 3)`` [nm/ps] along the constraints of positions ``(F, N, 3)``."""


def by_host(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What a host makes of plain tensors, a constant of differentiation."""
    return constant(lambda *plain: function(*plain).to(plain[0]), *tensors)


def check_agreement(given: Tensor, own: Tensor) -> None:
    """Raise unless a host's velocities are those of the map that is differentiated.

    Raises
    ------
    ConstraintError
        If they are others, or too rough where a derivative is asked for.
    """
    limit = differentiable_limit(own.dtype) if own.requires_grad else _OTHER

    def check(found: Tensor, wanted: Tensor) -> Tensor:
        error = float((found - wanted).abs().max()) if found.numel() else 0.0
        size = float(wanted.abs().max()) if found.numel() else 0.0
        if error > limit * size:
            raise ConstraintError(
                f"solver: the host's velocities differ from a projection by {error:.1e} nm/ps, of "
                f"at most {size:.1e}; check that it has the same constraints and masses, and ask "
                "it for a smaller tolerance"
            )
        return found.new_empty(0)

    observe(check, lambda result, _: result, given, own)
