"""How far apart frames must be to be independent."""

from __future__ import annotations

import numpy as np


def statistical_inefficiency(series: np.ndarray) -> float:
    """Statistical inefficiency ``g = 1 + 2 sum_t (1 - t/N) C(t)`` of a series, in samples.

    The sum over the normalised autocorrelation function ends where it first drops to zero
    (Chodera et al., J. Chem. Theory Comput. 3, 26, 2007, eq. 20).
    """
    deviation = series - series.mean()
    n = len(deviation)
    variance = float(deviation @ deviation) / n
    if variance <= 1e-14 * max(1.0, float(series @ series) / n):
        return 1.0
    # Zero padding keeps the circular correlation of the FFT from wrapping around.
    power = np.abs(np.fft.rfft(deviation, 2 * n)) ** 2
    lags = np.arange(n)
    correlation = np.fft.irfft(power)[:n] / (variance * (n - lags))
    ends = np.flatnonzero(correlation <= 0)
    end = int(ends[0]) if len(ends) else n
    weights = 1 - lags[1:end] / n
    return max(1.0, 1.0 + 2.0 * float(weights @ correlation[1:end]))


def decorrelation_interval(series: np.ndarray) -> float:
    """Samples between independent frames: the largest inefficiency of the rows ``(k, n)``.

    The first fifth is left out, and the answer is at most a fifth of the rest, because a series
    says nothing about correlations as long as itself.
    """
    kept = series[:, series.shape[1] // 5 :]
    slowest = max(statistical_inefficiency(row) for row in kept)
    return float(min(slowest, kept.shape[1] / 5))
