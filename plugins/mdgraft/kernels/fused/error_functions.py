"""The error function and its complement, for all lanes of a vector."""

from __future__ import annotations

from mdgraft.kernels.fused import coefficients
from mdgraft.kernels.fused.arithmetic import Real, fma, muladd, polynomial
from mdgraft.kernels.fused.exponentials import corrected_exponential, scaled


def _complement(a: Real) -> Real:
    """erfc(a) for a >= 0, up to where it underflows."""
    limit, k = (27.4, 3.5) if a.format.double else (10.2, 3.0)
    a = a.limited(None, limit)
    square = a * a
    p, p_l, n = corrected_exponential(-square, -fma(a, a, -square))
    # 1 / (a + k) = y (1 + y_l). Rounding a + k alone would change a small a by several units in
    # the last place, so what is lost is corrected.
    d = a + k
    d_l = a - (d - k)
    y = 1.0 / d
    y_l = fma(-y, d_l, fma(-y, d, a.format.real(1.0)))
    # t = (a - k) / (a + k) = 1 - 2 k y.
    t = fma(-2.0 * k * y, y_l, fma(y, -2.0 * k, a.format.real(1.0)))
    rest = y * polynomial(t, coefficients.ERFC)
    result = p * rest
    return scaled(result + muladd(rest, p_l, result * y_l), n)


def _near_zero(x: Real) -> Real:
    return muladd(x, polynomial(x * x, coefficients.ERF), x)


def erf(x: Real) -> Real:
    """The error function."""
    a = x.magnitude()
    return (a < 1.0).choose(_near_zero(a), 1.0 - _complement(a)).with_sign(x)


def erfc(x: Real) -> Real:
    """One less the error function, without cancellation."""
    a = x.magnitude()
    complement = _complement(a)
    far = (x < 0.0).choose(2.0 - complement, complement)
    return (a < 0.625).choose(1.0 - _near_zero(x), far)
