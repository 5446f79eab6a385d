"""The unadjusted Langevin algorithm."""

from __future__ import annotations

from mdgraft.montecarlo._langevin import AbstractLangevinMove


class ULA(AbstractLangevinMove):
    """Steps of overdamped Langevin dynamics without a test: the samples are biased.

    ``x' = x + (s^2/2 m) beta F(x) + (s / sqrt m) xi``, all of which are taken. The stationary law
    differs from the target's by an amount of order ``s^2``; samples say so (``Samples.bias``) and
    enter no `Ensemble`. Useful where a gradient along the path is wanted, which accepting and
    rejecting would cut. ``log_alpha`` is that of `MALA`, a measure of the bias.

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

    adjusted = False
