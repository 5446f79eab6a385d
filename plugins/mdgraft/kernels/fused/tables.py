"""Polynomials of the screening functions of Ewald sums.

Both are of the form ``B_a(x) = gamma(a, x) / x^a = integral_0^1 t^(a-1) exp(-x t) dt``, with
``x = (alpha r)^2``: the mesh's share of a Coulomb pair is ``alpha B_1/2(x) / sqrt(pi)``, that of a
dispersion pair ``alpha^6 B_3(x) / 2``. They are smooth everywhere, and so are their derivatives,
``B_a' = -B_(a+1)``.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import scipy.special

from mdgraft.kernels.fused.graph import Series

#: Exponent a by the name of the series.
EXPONENTS = {"coulomb": 0.5, "dispersion": 3.0}
#: Polynomials of higher degrees lose digits.
_HIGHEST = 40


def screening(exponent: float, x: np.ndarray) -> np.ndarray:
    """``B_a(x)`` for x >= 0."""
    small = x < 1e-3
    safe = np.where(small, 1.0, x)
    power = safe**exponent
    closed = scipy.special.gammainc(exponent, safe) * math.gamma(exponent) / power
    series = sum((-x) ** k / (math.factorial(k) * (exponent + k)) for k in range(6))
    result: np.ndarray = np.where(small, series, closed)
    return result


@functools.lru_cache(maxsize=64)
def degree(name: str, alpha: float, cutoff: float, accuracy: float) -> int | None:
    """Degree at which the polynomial up to a cutoff is as accurate as asked for.

    None if none is: where alpha times the cutoff is large, powers cancel.
    """
    n = 64
    x = 0.5 * (np.polynomial.chebyshev.chebpts1(n) + 1) * (alpha * cutoff) ** 2
    fitted = np.polynomial.chebyshev.chebfit(
        np.polynomial.chebyshev.chebpts1(n), screening(EXPONENTS[name], x), n - 1
    )
    tail = np.cumsum(np.abs(fitted)[::-1])[::-1]
    enough = np.flatnonzero(tail <= accuracy * np.abs(fitted).max())
    found = int(enough[0]) if len(enough) else n - 1
    # Even degrees only, so that code is compiled less often.
    chosen = min(2 * math.ceil(found / 2), _HIGHEST)
    u = np.linspace(0, cutoff**2, 500)
    for order in range(3):
        factor, shift, *powers = coefficients(Series(name, chosen, order), alpha, cutoff)
        exact = (-(alpha**2)) ** order * screening(EXPONENTS[name] + order, alpha**2 * u)
        error = np.abs(np.polynomial.polynomial.polyval(factor * u + shift, powers) - exact)
        if error.max() > 10 * accuracy * np.abs(exact).max():
            return None
    return chosen


@functools.lru_cache(maxsize=256)
def coefficients(series: Series, alpha: float, cutoff: float) -> np.ndarray:
    """Factor, shift and coefficients of a series in the squared distance up to the cutoff."""
    half = 0.5 * cutoff**2
    nodes = np.polynomial.chebyshev.chebpts1(series.degree + 1)
    x = alpha**2 * half * (nodes + 1)
    values = (-(alpha**2)) ** series.order * screening(EXPONENTS[series.name] + series.order, x)
    powers = np.polynomial.chebyshev.cheb2poly(_interpolated(nodes, values))
    padded = np.zeros(series.degree + 1)
    padded[: len(powers)] = powers
    return np.concatenate([[1 / half, -1.0], padded])


def _interpolated(nodes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Chebyshev coefficients from values at the zeros of a Chebyshev polynomial."""
    n = len(nodes)
    basis = np.polynomial.chebyshev.chebvander(nodes, n - 1)
    result: np.ndarray = 2 / n * basis.T @ values
    result[0] /= 2
    return result
