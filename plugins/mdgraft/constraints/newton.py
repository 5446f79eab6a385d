"""Newton's iteration for constrained distances."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mdgraft._errors import ConstraintError, InvalidInputError
from mdgraft.constraints._clusters import AbstractClusters, dot

#: Residuals above this many roundings are not differentiated.
_LIMIT: dict[torch.dtype, float] = {torch.float64: 1e-8, torch.float32: 2e-5}
#: Residuals that rounding alone may leave, in units of the precision.
_ROUNDINGS = 64


def differentiable_limit(dtype: torch.dtype) -> float:
    """Largest relative error of a length at which derivatives are still taken."""
    limit = _LIMIT.get(dtype)
    return math.sqrt(torch.finfo(dtype).eps) if limit is None else limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Newton:
    """Coupled Newton iteration on each connected cluster (M-SHAKE).

    Converges quadratically, whatever the topology; steps that do not reduce the residual of a
    cluster are halved. (Kraeutler, van Gunsteren and Huenenberger, J. Comput. Chem. 22, 501
    (2001).)

    Parameters
    ----------
    tolerance
        Largest relative error of a constrained length; None for what rounding allows, which costs
        one more iteration. Derivatives at a tolerance above 1e-8 (2e-5 in single precision) raise
        `ConstraintError`: they would be wrong by as much.
    max_iterations
        Iterations before the solver gives up.

    Raises
    ------
    InvalidInputError
        For a tolerance or a number of iterations that is not positive.
    """

    tolerance: float | None = None
    max_iterations: int = 60

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0.0 < self.tolerance < math.inf:
            raise InvalidInputError(
                f"tolerance: got {self.tolerance!r}, wanted a positive relative error or None"
            )
        if self.max_iterations < 1:
            raise InvalidInputError(f"max_iterations: got {self.max_iterations}, wanted at least 1")

    def aim(self, dtype: torch.dtype) -> float:
        """The tolerance in this precision."""
        rounding = _ROUNDINGS * torch.finfo(dtype).eps
        return rounding if self.tolerance is None else max(self.tolerance, rounding)

    def solve(
        self,
        clusters: AbstractClusters,
        trial: Tensor,
        reference: Tensor,
        coupling: Tensor,
        squares: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Multipliers and residuals, both ``(F, K, m)`` and ``(F, K)``.

        Parameters
        ----------
        clusters
            A batch of clusters.
        trial, reference
            Vectors ``(F, K, m, 3)`` [nm] of constrained pairs, before the projection and those
            along which forces of constraint act.
        coupling
            C [1/Da].
        squares
            Squared lengths ``(F | 1, K, m)`` [nm^2].

        Raises
        ------
        ConstraintError
            If a cluster does not converge.
        """
        aim = self.aim(trial.dtype)
        loose = max(aim, 16 * _ROUNDINGS * torch.finfo(trial.dtype).eps)
        weights = 1.0 / squares
        if clusters.present is not None:
            weights = weights * clusters.present
        best = trial.new_zeros(trial.shape[:-1])
        step = torch.zeros_like(best)
        damping = trial.new_ones(trial.shape[:-2])
        error = torch.full_like(damping, torch.inf)
        residual = error
        for _ in range(self.max_iterations):
            kappa = best + damping.unsqueeze(-1) * step
            vectors = trial + clusters.image(coupling, kappa.unsqueeze(-1) * reference)
            lengths = dot(vectors, vectors)
            deviation = (lengths - squares) * weights
            found = deviation.abs().amax(dim=-1)
            better = found < error
            if bool(better.all()):
                best, error, damping = kappa, found, torch.ones_like(damping)
            else:
                best = torch.where(better.unsqueeze(-1), kappa, best)
                error = torch.where(better, found, error)
                damping = torch.where(better, 1.0, 0.5 * damping)
            residual = 0.5 * error
            if bool(((residual <= aim) | ((residual <= loose) & (damping < 0.1))).all()):
                return best, residual
            matrix = clusters.matrix(2.0 * coupling * clusters.products(vectors, reference))
            newton = clusters.solve_plain(matrix, -deviation * squares)
            step = torch.where(better.unsqueeze(-1), newton, step)
        frame, cluster = (~(residual <= aim)).nonzero()[0].tolist()
        raise ConstraintError(
            f"positions: the constraints {clusters.described(cluster)} of frame {frame} are not "
            f"met after {self.max_iterations} iterations (relative error of a length "
            f"{float(residual[frame, cluster]):.2e}, wanted {aim:.1e}); the positions may have "
            "moved too far from the reference, or the lengths may contradict each other: take a "
            "shorter time step, or check the lengths"
        )
