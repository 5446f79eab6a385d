"""The covariance gradient of equilibrium averages."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from mdgraft._errors import InsufficientOverlapError, InvalidInputError
from mdgraft.ensembles.overlap import (
    Overlap,
    entropy_sample_size,
    kish_sample_size,
    pareto_k,
    uniform,
)

#: Below this relative variance of the weights the shape of their tail is immaterial.
_IMMATERIAL = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Covariance:
    """Gradient of averages by covariances with the energy, reweighted away from the sampled state.

    ``<O> = sum_i w_i O_i`` with ``w_i ~ exp(-beta [U(x_i) - U_0(x_i)])`` and U_0 the energy that
    generated the frames; its derivative ``<dO> - beta Cov(O, dU)`` is exact for these frames and
    consistent for the ensemble. Boxes that fluctuate at constant pressure change nothing, since
    ``P V`` and the ideal-gas factor cancel from the weights. (Thaler and Zavadlav, Nat. Commun.
    12, 6884 (2021); Wang et al., J. Phys. Chem. Lett. 5, 1885 (2014).)

    Frames must follow the Boltzmann distribution of U_0: neither microcanonical nor driven. The
    method fails when parameters have moved so far that few frames carry all weight; it raises
    then, and new frames must be sampled.

    Parameters
    ----------
    min_ess
        Least Kish effective sample size as a fraction of the frames, from 0 to 1.
    max_pareto_k
        Largest shape of the tail of the weights; judged only where weights vary by more than
        10 % (relative standard deviation).

    Raises
    ------
    InvalidInputError
        For a fraction outside [0, 1].
    """

    min_ess: float = 0.1
    max_pareto_k: float = 0.7

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_ess <= 1.0:
            raise InvalidInputError(
                f"min_ess: got {self.min_ess!r}, wanted a fraction of the frames from 0 to 1"
            )
        if not self.max_pareto_k > 0.0:
            raise InvalidInputError(
                f"max_pareto_k: got {self.max_pareto_k!r}, wanted a positive number such as 0.7"
            )

    def overlap(self, log_weights: Tensor) -> Overlap:
        """Judge unnormalised log weights ``(N,)`` without raising for bad ones."""
        n = log_weights.shape[0]
        if uniform(log_weights):
            return Overlap(
                n_frames=n,
                effective_sample_size=float(n),
                entropy_sample_size=float(n),
                max_weight=1.0 / n,
                pareto_k=None,
                ok=True,
            )
        kish = kish_sample_size(log_weights)
        k = pareto_k(log_weights)
        material = n / kish - 1.0 > _IMMATERIAL
        heavy = material and k is not None and k > self.max_pareto_k
        return Overlap(
            n_frames=n,
            effective_sample_size=kish,
            entropy_sample_size=entropy_sample_size(log_weights),
            max_weight=float(log_weights.detach().double().softmax(dim=0).max()),
            pareto_k=k,
            ok=kish >= self.min_ess * n and not heavy,
        )

    def require(self, overlap: Overlap) -> None:
        """Raise `InsufficientOverlapError` unless the overlap is sufficient."""
        if overlap.ok:
            return
        n, kish = overlap.n_frames, overlap.effective_sample_size
        tail = "not fitted" if overlap.pareto_k is None else f"{overlap.pareto_k:.2f}"
        raise InsufficientOverlapError(
            f"parameters: have moved too far from those that generated the frames; the effective "
            f"sample size is {kish:.4g} of {n} frames (wanted at least {self.min_ess * n:.4g}), "
            f"Pareto k is {tail} (wanted at most {self.max_pareto_k:g}); sample new frames with "
            "the present parameters and build a new Ensemble, or take smaller steps"
        )
