"""Exponentials, logarithms and what is made of them, for all lanes of a vector."""

from __future__ import annotations

import math

from mdgraft.kernels.fused import coefficients
from mdgraft.kernels.fused.arithmetic import Integer, Real, fma, horner, muladd, polynomial

_INFINITY = math.inf
_LOG2_E = 1.4426950408889634
#: ln(2) as a sum of two numbers: float32, float64.
_LN2 = ((0.6931472, -1.9046542e-09), (0.6931471805599453, 2.3190468138462996e-17))
#: 1/3 as a sum of two numbers in float64.
_THIRD = (0.3333333333333333, 1.850371707708594e-17)


# Parts ----------------------------------------------------------------------------------------


def scaled_exponential(x: Real) -> tuple[Real, Integer]:
    """exp(x) = p 2^n for numbers up to a few thousand."""
    k, n = _multiple_of_ln2(x)
    high, low = _LN2[x.format.double]
    # The first step is exact: what cancels leaves room for all that is left.
    return 1.0 + _exponential_minus_one(fma(k, -low, fma(k, -high, x))), n


def corrected_exponential(x: Real, x_l: Real) -> tuple[Real, Real, Integer]:
    """exp(x + x_l) = (p + p_l) 2^n, where ``x_l`` and ``p_l`` are corrections."""
    k, n = _multiple_of_ln2(x)
    high, low = _LN2[x.format.double]
    e = _exponential_minus_one(fma(k, -high, x) + fma(k, -low, x_l))
    p = 1.0 + e
    return p, (1.0 - p) + e, n


def _multiple_of_ln2(x: Real) -> tuple[Real, Integer]:
    form = x.format
    shifted = muladd(x, _LOG2_E, form.real(form.round))
    return shifted - form.round, shifted.bits() - form.pattern(form.round)


def _exponential_minus_one(r: Real) -> Real:
    return muladd(r * r, polynomial(r, coefficients.EXP), r)


def scaled(p: Real, n: Integer) -> Real:
    """Returns p 2^n, in two steps of which only the last one rounds, overflows or underflows."""
    form = p.format
    biased = n + 2 * form.bias
    half = biased >> 1
    first, second = half << form.mantissa, (biased - half) << form.mantissa
    return p * first.real() * second.real()


def _split(x: Real, *, subnormal: bool) -> tuple[Real, Real]:
    """(e, f) with x = 2^e (1 + f) and sqrt(1/2) <= 1 + f <= sqrt(2)."""
    form = x.format
    offset: Real | float = float(form.bias)
    if subnormal:
        tiny = x < 2.0 ** (1 - form.bias)
        x = tiny.choose(x * 2.0 ** (form.mantissa + 1), x)
        offset = tiny.choose(float(form.bias + form.mantissa + 1), float(form.bias))
    # The exponent of a number changes at sqrt(1/2) once these bits are added.
    shift = form.pattern(1.0) - form.pattern(math.sqrt(0.5))
    exponent = (x.bits() + shift) >> form.mantissa
    f = (x.bits() - ((exponent - form.bias) << form.mantissa)).real() - 1.0
    # Small integers are the last bits of a number of this size.
    e = (exponent + form.pattern(form.round)).real() - (form.real(offset) + form.round)
    return e, f


# Functions ------------------------------------------------------------------------------------


def exp(x: Real) -> Real:
    """The exponential."""
    low, high = (-746.0, 711.0) if x.format.double else (-105.0, 90.0)
    return scaled(*scaled_exponential(x.limited(low, high)))


def log(x: Real) -> Real:
    """The natural logarithm."""
    form = x.format
    e, f = _split(x, subnormal=True)
    s = f / (f + 2.0)
    z = s * s
    half = 0.5 * f * f
    # log(1 + f) = f - f²/2 + s (f²/2 + z p(z)): the largest terms are the most exact ones.
    high, low = _LN2[form.double]
    inner = muladd(s, half + z * polynomial(z, coefficients.LOG), e * low)
    result = fma(e, high, f - (half - inner))
    result = (x < _INFINITY).choose(result, x)
    result = x.equals(0.0).choose(-_INFINITY, result)
    return (x < 0.0).choose(math.nan, result)


def _half_exponential(a: Real) -> Real:
    """exp(a) / 2, which overflows where the hyperbolic functions do."""
    p, n = scaled_exponential(a.limited(None, 712.0 if a.format.double else 91.0))
    return scaled(p, n - 1)


def sinh(x: Real) -> Real:
    """The hyperbolic sine."""
    a = x.magnitude()
    h = _half_exponential(a)
    z = a * a
    small = muladd(a * z, polynomial(z, coefficients.SINH), a)
    return (a < 1.0).choose(small, h - 0.25 / h).with_sign(x)


def cosh(x: Real) -> Real:
    """The hyperbolic cosine."""
    h = _half_exponential(x.magnitude())
    return h + 0.25 / h


def tanh(x: Real) -> Real:
    """The hyperbolic tangent."""
    a = x.magnitude()
    z = a * a
    small = muladd(a * z, polynomial(z, coefficients.TANH), a)
    # Beyond the limit it is one.
    e = scaled(*scaled_exponential(2.0 * a.limited(None, 20.0 if a.format.double else 10.0)))
    return (a < 0.625).choose(small, 1.0 - 2.0 / (e + 1.0)).with_sign(x)


def pow(x: Real, y: Real) -> Real:
    """The power x^y."""
    a = x.magnitude()
    result = _power_in_double(a, y) if x.format.double else _power_by_double(a, y)
    whole = y.floor().equals(y)
    half = 0.5 * y
    odd = whole & ~half.floor().equals(half)
    # All infinite numbers are even.
    result = odd.choose(result.with_sign(x), result)
    outside = (x < 0.0) & (x > -_INFINITY) & (y.magnitude() < _INFINITY) & ~whole
    result = outside.choose(math.nan, result)
    one = x.equals(1.0) | y.equals(0.0) | (a.equals(1.0) & y.magnitude().equals(_INFINITY))
    return one.choose(1.0, result)


def _power_by_double(a: Real, y: Real) -> Real:
    """Powers in float32 from logarithms in float64, to the base two."""
    a = a.converted()
    e, f = _split(a, subnormal=False)
    s = f / (f + 2.0)
    z = s * s
    series = horner(z, (1.0, *_THIRD[:1], *coefficients.LOG_TAIL[0]))
    logarithm = muladd(s * (2.0 * _LOG2_E), series, e)
    logarithm = (a < _INFINITY).choose(logarithm, a)
    logarithm = a.equals(0.0).choose(-_INFINITY, logarithm)
    t = (y.converted() * logarithm).limited(-160.0, 140.0)
    k = (t + t.format.round) - t.format.round
    p = 1.0 + _exponential_minus_one(((t - k) * _LN2[1][0]).converted())
    form = p.format
    n = (k.converted() + form.round).bits() - form.pattern(form.round)
    return scaled(p, n)


def _power_in_double(a: Real, y: Real) -> Real:
    """Powers in float64 from logarithms that are sums of two numbers.

    ``x_l`` is what ``x`` lacks; sums and products of such pairs follow T. Dekker, Numer. Math. 18,
    224 (1971).
    """
    e, f = _split(a, subnormal=True)
    # s = f / (2 + f).
    d = f + 2.0
    d_l = f - (d - 2.0)
    inverse = 1.0 / d
    s = f * inverse
    s_l = fma(-s, d_l, fma(-s, d, f)) * inverse
    # z = s², then log(1 + f) = 2 (s + s z (1/3 + z q(z))).
    z = s * s
    z_l = muladd(2.0 * s, s_l, fma(s, s, -z))
    p = z * polynomial(z, coefficients.LOG_TAIL)
    c = p + _THIRD[0]
    c_l = (_THIRD[0] - c) + p + _THIRD[1]
    w = c * z
    w_l = fma(c, z, -w) + muladd(c, z_l, c_l * z)
    u = s * w
    u_l = fma(s, w, -u) + muladd(s, w_l, s_l * w)
    half = s + u
    half_l = (s - half) + u + (u_l + s_l)
    # With e ln(2), which is either zero or the larger number.
    high, low = _LN2[1]
    g = e * high
    g_l = muladd(e, low, fma(e, high, -g))
    total = muladd(2.0, half, g)
    total_l = (g - total) + 2.0 * half + muladd(2.0, half_l, g_l)
    logarithm = total + total_l
    logarithm_l = total_l - (logarithm - total)
    logarithm = (a < _INFINITY).choose(logarithm, a)
    logarithm = a.equals(0.0).choose(-_INFINITY, logarithm)
    t = y * logarithm
    t_l = muladd(y, logarithm_l, fma(y, logarithm, -t))
    # Where it overflows or underflows, the correction may be no number.
    t_l = (t.magnitude() < 800.0).choose(t_l, 0.0)
    p, _, n = corrected_exponential(t.limited(-800.0, 800.0), t_l)
    return scaled(p, n)
