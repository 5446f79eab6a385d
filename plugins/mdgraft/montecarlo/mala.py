"""The Metropolis-adjusted Langevin algorithm."""

from __future__ import annotations

from mdgraft.montecarlo._langevin import AbstractLangevinMove


class MALA(AbstractLangevinMove):
    """One step of overdamped Langevin dynamics as a proposal, accepted or rejected.

    ``x' = x + (s^2/2 m) beta F(x) + (s / sqrt m) xi`` (Rossky, Doll and Friedman, J. Chem. Phys.
    69, 4628 (1978); Roberts and Tweedie, Bernoulli 2, 341 (1996)). One evaluation of forces a step.

    Parameters
    ----------
    scale
        s, the standard deviation of a coordinate with m = 1 [nm].
    mass
        m, ``(N,)`` without unit: how much less than s a particle moves; 1 by default.
    name
        Under which the move is counted.

    Raises
    ------
    InvalidInputError
        For a scale or mass that is not positive.
    """
