"""Trigonometric functions and their inverses, for all lanes of a vector."""

from __future__ import annotations

import dataclasses

from mdgraft.kernels.fused import coefficients
from mdgraft.kernels.fused.arithmetic import Format, Integer, Mask, Real, fma, muladd, polynomial

_TWO_OVER_PI = 0.6366197723675814
#: pi/2 as sums of numbers: float32, float64.
_HALF_PI = (
    (1.5707964, -4.371139e-08, -1.7151245e-15),
    (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591698e-33),
)
#: Up to here multiples of pi/2 can be taken off.
_LARGEST = (1e5, 1e9)


@dataclasses.dataclass(frozen=True)
class Angle:
    """What sine, cosine and tangent of an argument share.

    Attributes
    ----------
    sine, cosine
        Of the distance r of the argument's magnitude to the nearest multiple of pi/2.
    quadrant
        That multiple; only the last bits are right.
    sign
        Of the argument.
    huge
        Where all this is wrong.
    """

    sine: Real
    cosine: Real
    quadrant: Integer
    sign: Integer
    huge: Mask

    @property
    def odd(self) -> Mask:
        """Where sine and cosine change places."""
        return (self.quadrant & 1).nonzero()


def reduced(x: Real) -> Angle:
    """What sine, cosine and tangent share."""
    form = x.format
    a = x.magnitude()
    shifted = muladd(a, _TWO_OVER_PI, form.real(form.round))
    k = shifted - form.round
    r = a
    # The first step is exact, and each of the others makes an error in what is left only.
    for part in _HALF_PI[form.double]:
        r = fma(k, -part, r)
    z = r * r
    sine = muladd(r * z, polynomial(z, coefficients.SIN), r)
    cosine = muladd(z * z, polynomial(z, coefficients.COS), fma(z, -0.5, form.real(1.0)))
    return Angle(sine, cosine, shifted.bits(), x.sign(), a > _LARGEST[form.double])


def sin(angle: Angle) -> Real:
    """The sine."""
    top = angle.sine.format.bits - 2
    sign = ((angle.quadrant & 2) << top) ^ angle.sign
    return angle.odd.choose(angle.cosine, angle.sine).flipped(sign)


def cos(angle: Angle) -> Real:
    """The cosine."""
    top = angle.sine.format.bits - 2
    sign = ((angle.quadrant + 1) & 2) << top
    return angle.odd.choose(angle.sine, angle.cosine).flipped(sign)


def tan(angle: Angle) -> Real:
    """The tangent."""
    odd, top = angle.odd, angle.sine.format.bits - 1
    sign = ((angle.quadrant & 1) << top) ^ angle.sign
    above = odd.choose(angle.cosine, angle.sine)
    return (above / odd.choose(angle.sine, angle.cosine)).flipped(sign)


# Inverses -------------------------------------------------------------------------------------


def _from_half_pi(form: Format, x: Real) -> Real:
    """pi/2 - x."""
    high, low, _ = _HALF_PI[form.double]
    return high - (x - low)


def _arc_of_slope(t: Real) -> Real:
    """The arc tangent of a number from zero to one."""
    z = t * t
    return muladd(t * z, polynomial(z, coefficients.ATAN), t)


def atan(x: Real) -> Real:
    """The arc tangent."""
    a = x.magnitude()
    steep = a > 1.0
    arc = _arc_of_slope(steep.choose(1.0 / a, a))
    return steep.choose(_from_half_pi(x.format, arc), arc).with_sign(x)


def atan2(y: Real, x: Real) -> Real:
    """The angle of the point (x, y)."""
    form = x.format
    a, b = x.magnitude(), y.magnitude()
    steep = b > a
    above, below = steep.choose(a, b), steep.choose(b, a)
    # The quotients of two zeros and of two infinite numbers are what C99 says.
    of_equal = below.equals(0.0).choose(0.0, 1.0)
    t = above.equals(below).choose(of_equal, above / below)
    arc = _arc_of_slope(t)
    arc = steep.choose(_from_half_pi(form, arc), arc)
    # pi - arc, also to the left of a vertical line.
    left = x.sign().nonzero()
    arc = left.choose(2.0 * _from_half_pi(form, 0.5 * arc), arc)
    return arc.with_sign(y)


def _half_arc(x: Real) -> tuple[Mask, Real]:
    """asin(a), a = abs(x), where a <= 1/2; beyond that half of acos(a)."""
    a = x.magnitude()
    large = a > 0.5
    z = large.choose(0.5 * (1.0 - a), a * a)
    s = large.choose(z.sqrt(), a)
    return large, muladd(s * z, polynomial(z, coefficients.ASIN), s)


def asin(x: Real) -> Real:
    """The arc sine."""
    large, arc = _half_arc(x)
    return large.choose(_from_half_pi(x.format, 2.0 * arc), arc).with_sign(x)


def acos(x: Real) -> Real:
    """The arc cosine."""
    form = x.format
    large, arc = _half_arc(x)
    near = (x < 0.0).choose(2.0 * _from_half_pi(form, arc), 2.0 * arc)
    return large.choose(near, _from_half_pi(form, arc.with_sign(x)))
