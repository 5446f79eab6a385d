"""Statistics of correlated series, many series at a time.

Series are tensors ``(F, ...)``: F frames in the order of sampling, any number of quantities.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError

#: Entries of a series that are transformed at a time, which bounds the memory.
_CHUNK = 1 << 23
#: Two-sided 95 % point of the normal distribution.
_Z = 1.959963984540054


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equilibration:
    """Where a series becomes stationary.

    Attributes
    ----------
    start
        Index of the first frame to keep.
    statistical_inefficiency
        Of the series from there on.
    n_effective
        Number of effectively independent frames that are kept.
    """

    start: int
    statistical_inefficiency: float
    n_effective: float


def _columns(series: Tensor) -> Tensor:
    """Bring ``(F, ...)`` to float64 ``(F, S)``."""
    if not torch.is_tensor(series) or series.ndim < 1 or series.shape[0] < 1:
        shape = tuple(series.shape) if torch.is_tensor(series) else type(series).__name__
        raise InvalidInputError(f"series: got {shape}, wanted a tensor (frames, ...)")
    if not bool(torch.isfinite(series).all()):
        raise InvalidInputError("series: holds NaN or infinity")
    return series.detach().double().reshape(series.shape[0], -1)


def autocovariance(series: Tensor) -> Tensor:
    """Autocovariance at every lag, normalised by F (biased, positive definite).

    Parameters
    ----------
    series
        ``(F, ...)``.

    Returns
    -------
    Tensor
        ``(F, ...)``; entry k holds ``sum_t (x_t - x)(x_{t+k} - x) / F``.
    """
    columns = _columns(series)
    return _autocovariance(columns).reshape(series.shape)


def _autocovariance(columns: Tensor) -> Tensor:
    n = columns.shape[0]
    centred = columns - columns.mean(dim=0)
    # Padding to twice the length keeps the circular transform from wrapping around.
    spectrum = torch.fft.rfft(centred, n=1 << (2 * n - 1).bit_length(), dim=0)
    power = spectrum.real.square() + spectrum.imag.square()
    inverse: Tensor = torch.fft.irfft(power, n=1 << (2 * n - 1).bit_length(), dim=0)
    return inverse[:n] / n


def _inefficiency(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Statistical inefficiency ``(S,)`` and the number of lags it used ``(S,)``."""
    n, n_series = columns.shape
    g, window = columns.new_ones(n_series), columns.new_ones(n_series)
    if n < 4:
        return g, window
    width = max(1, _CHUNK // n)
    for start in range(0, n_series, width):
        chunk = columns[:, start : start + width]
        covariance = _autocovariance(chunk)
        variance = covariance[0]
        # Rounding noise of a constant series is no fluctuation.
        scale = chunk.abs().amax(dim=0)
        varies = variance > (1e-14 * scale) ** 2
        rho = covariance / torch.where(varies, variance, 1.0)
        # Geyer: sums of neighbouring pairs of a reversible chain are positive and decreasing.
        pairs = rho[0 : 2 * (n // 2) : 2] + rho[1 : 2 * (n // 2) : 2]
        initial = (pairs > 0).cumprod(dim=0).bool()
        total = 2.0 * torch.where(initial, pairs, 0.0).sum(dim=0) - 1.0
        here = slice(start, start + chunk.shape[1])
        g[here] = torch.where(varies, total.clamp(min=1.0, max=float(n)), 1.0)
        window[here] = torch.where(varies, (4.0 * initial.sum(dim=0) - 1.0).clamp(min=1.0), 1.0)
    return g, window


def statistical_inefficiency(series: Tensor) -> Tensor:
    """Number of correlated frames that weigh as much as one independent frame.

    ``g = 1 + 2 sum_k rho_k`` over the initial positive sequence of pairs of autocorrelations
    (Geyer, Statistical Science 7, 473 (1992), section 3.3), at least 1: anticorrelation is not
    credited.

    Parameters
    ----------
    series
        ``(F, ...)``.

    Returns
    -------
    Tensor
        ``(...,)``, between 1 and F; 1 for a constant series.

    Raises
    ------
    InvalidInputError
        If the series is empty or not finite.
    """
    return _inefficiency(_columns(series))[0].reshape(series.shape[1:])


def standard_error(influence: Tensor) -> Tensor:
    """Calibrated standard error of an average from its influence series.

    Large samples: ``SE^2 = g Var(psi) / F``. For few effective samples ``n = F / g`` that interval
    is too narrow, for three reasons corrected here:

    - the mean that was subtracted removes variance within the window of W lags that were summed:
      ``g -> g / (1 - W / F)``;
    - the variance itself is uncertain: Student's factor ``1 + (z^2 + 1) W / (4 F)``;
    - for skewed series, such as products of fluctuations, estimate and error are correlated:
      Hall's second-order critical point of the two-sided t interval,
      ``1 + [(z^2 + 3)/4 + s^2 (z^4 + 2 z^2 - 3)/18 - k (z^2 - 3)/12] / n`` with skewness s and
      excess kurtosis k (Hall, The Bootstrap and Edgeworth Expansion (1992), section 2.6).

    The sample skewness of few frames is both noisy, where tails are heavy, and too small, where
    the distribution is skewed. ``s^2`` is therefore multiplied by 2, by
    ``(3/2 - 1/(2 g))^2``, the gain in skewness by correlation of the square of an
    Ornstein-Uhlenbeck process, and by a factor that rises from 0 to 1 while ``s^2 / (k + 2)``,
    the squared correlation of the series with its own square, rises from 0.3 to 0.6: it leaves
    symmetric tails alone. The numbers were chosen for the coverage of gradients of harmonic
    averages over such processes.

    Parameters
    ----------
    influence
        ``(F, ...)`` influence series, whose average is the estimate's first-order error.

    Returns
    -------
    Tensor
        ``(...,)``; infinite for a single frame, zero for a constant series.
    """
    columns = _columns(influence)
    return _standard_error(columns)[0].reshape(influence.shape[1:])


def _standard_error(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Calibrated standard error and statistical inefficiency, each ``(S,)``."""
    n = columns.shape[0]
    if n < 2:
        ones = columns.new_ones(columns.shape[1])
        return ones * math.inf, ones
    g, window = _inefficiency(columns)
    centred = columns - columns.mean(dim=0)
    variance = centred.square().mean(dim=0)
    safe = torch.where(variance > 0, variance, 1.0)
    skewness_squared = centred.pow(3).mean(dim=0).square() / safe.pow(3)
    kurtosis = centred.pow(4).mean(dim=0) / safe.square() - 3.0
    widened = g / (1.0 - window / n).clamp(min=0.2)
    z2 = _Z * _Z
    gain = 2.0 * (1.5 - 0.5 / widened).square()
    one_sided = skewness_squared / (kurtosis + 2.0).clamp(min=1e-12)
    skewed = gain * skewness_squared * ((one_sided - 0.3) / 0.3).clamp(min=0.0, max=1.0)
    hall = (
        (z2 + 3.0) / 4.0 + skewed * (z2 * z2 + 2.0 * z2 - 3.0) / 18.0 - kurtosis * (z2 - 3.0) / 12.0
    ) * (widened / n)
    student = (z2 + 1.0) / 4.0 * (window / n)
    error = torch.sqrt(widened * variance / n) * (1.0 + hall + student).clamp(min=1.0)
    return error, g


def detect_equilibration(series: Tensor, *, n_starts: int = 50) -> Equilibration:
    """Find the start that keeps the most effectively independent frames.

    Chodera, J. Chem. Theory Comput. 12, 1799 (2016): maximise ``(F - t0) / g(t0)`` over t0.

    Parameters
    ----------
    series
        ``(F,)`` one quantity, or ``(F, ...)`` several, of which the slowest decides.
    n_starts
        Number of starts tried, evenly spaced over the series.

    Raises
    ------
    InvalidInputError
        If the series is empty or not finite.
    """
    columns = _columns(series)
    n = columns.shape[0]
    stride = max(1, n // n_starts)
    best = Equilibration(start=0, statistical_inefficiency=1.0, n_effective=0.0)
    for start in range(0, max(1, n - max(3, n // 20)), stride):
        g = max(_inefficiency(columns[start:])[0].tolist(), default=1.0)
        if (n - start) / g > best.n_effective:
            best = Equilibration(
                start=start, statistical_inefficiency=g, n_effective=(n - start) / g
            )
    return best


def decorrelate(series: Tensor) -> Tensor:
    """Indices of frames that are about one statistical inefficiency apart.

    Parameters
    ----------
    series
        ``(F,)`` one quantity, or ``(F, ...)`` several, of which the slowest decides.

    Returns
    -------
    Tensor
        ``(n,)`` int64, increasing, starting with 0.
    """
    columns = _columns(series)
    g = max(_inefficiency(columns)[0].tolist(), default=1.0)
    count = max(1, math.ceil(columns.shape[0] / g))
    picks = (torch.arange(count, device=series.device, dtype=torch.float64) * g).round().long()
    return picks[picks < columns.shape[0]]
