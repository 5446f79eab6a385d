"""Damping of interactions between exponential charge densities.

J. A. Rackers, R. R. Silva, Z. Wang and J. W. Ponder, J. Chem. Theory Comput. 17, 7056 (2021) and
its supporting information. All functions depend on products of distances and inverse widths alone.
Those of two densities divide by powers of the difference of the widths; where it is small, a power
series takes their place, so that values and derivatives hold for equal widths as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

#: A Laurent polynomial: coefficients by exponent.
Laurent = Mapping[int, Fraction]

# exp(-x) times a polynomial is what one density takes from 1/r, 1/r^3, ..., 1/r^9.
_ONE: tuple[tuple[str, ...], ...] = (
    ("1", "1/2"),
    ("1", "1", "1/2"),
    ("1", "1", "1/2", "1/6"),
    ("1", "1", "1/2", "1/6", "1/30"),
    ("1", "1", "1/2", "1/6", "4/105", "1/210"),
)
# The further polynomials of two densities.
_TWO: tuple[tuple[str, ...], ...] = (
    ("1",),
    ("1", "1"),
    ("1", "1", "1/3"),
    ("1", "1", "2/5", "1/15"),
    ("1", "1", "3/7", "2/21", "1/105"),
)
# Overlap and its derivatives: what stands alone, and what is divided by the difference.
_OVERLAP: tuple[tuple[dict[int, str], tuple[str, ...]], ...] = (
    ({-1: "1"}, ("4",)),
    ({0: "1"}, ("4", "4")),
    ({0: "1", 1: "1"}, ("12", "12", "4")),
    ({0: "3", 1: "3", 2: "1"}, ("60", "60", "24", "4")),
    ({0: "15", 1: "15", 2: "6", 3: "1"}, ("420", "420", "180", "40", "4")),
)
# Largest ratio of the difference of widths to their sum for which the series is used, and its
# order. There the series is accurate to 1e-12, and so is the closed form beyond.
_NEAR, _ORDER = 0.03, 5


def one_center(x: Tensor, count: int) -> list[Tensor]:
    """Factors of 1/r, 1/r^3, ... between a point and a density, ``x`` distance over width."""
    rest = torch.exp(-x)
    return [1 - _evaluate(_polynomial(row), x) * rest for row in _ONE[:count]]


def two_centers(p: Tensor, q: Tensor, count: int) -> list[Tensor]:
    """Factors of 1/r, 1/r^3, ... between two densities."""
    product = (p * q) ** 4
    bridges = (_bridge(_two_terms(n), _series(_two_terms, n), p, q) for n in range(count))
    return [1 - product * bridge for bridge in bridges]


def overlap(p: Tensor, q: Tensor, r: Tensor) -> list[Tensor]:
    """Radial factors of Pauli repulsion, in place of those of 1/r to 1/r^9."""
    root = (p * q) ** 2.5
    inverse = 1 / r
    f = [root * _bridge(_overlap_terms(n), _series(_overlap_terms, n), p, q) for n in range(5)]
    products = (
        0.5 * f[0] * f[0],
        f[0] * f[1],
        f[0] * f[2] + f[1] * f[1],
        f[0] * f[3] + 3 * f[1] * f[2],
        f[0] * f[4] + 4 * f[1] * f[3] + 3 * f[2] * f[2],
    )
    return [8192 * product * inverse ** (2 * n + 1) for n, product in enumerate(products)]


Terms = tuple[Laurent, Laurent]


@functools.cache
def _two_terms(n: int) -> Terms:
    return _shifted(_polynomial(_ONE[n]), -4), _shifted(_polynomial(_TWO[n]), -2)


@functools.cache
def _overlap_terms(n: int) -> Terms:
    alone, divided = _OVERLAP[n]
    own = {power: Fraction(c) for power, c in alone.items()}
    return own, {power: c / 2 for power, c in _polynomial(divided).items()}


def _bridge(terms: Terms, powers: tuple[Laurent, ...], p: Tensor, q: Tensor) -> Tensor:
    """``[S(p) + S(q)]/D^2 + 2 [T(p) - T(q)]/D^3`` with D = p^2 - q^2 and S, T = s, t times exp(-x).

    It is regular at p = q: in half the difference y and the mean x, the sum over k > 0 of
    ``y^(2k-2)/(16 x^2) [2 S^(2k)/(2k)! + T^(2k+1)/(x (2k+1)!)]``.
    """
    x, y = 0.5 * (p + q), 0.5 * (p - q)
    near = y.detach().abs() < _NEAR * x.detach()
    # Each branch gets harmless numbers where the other one counts.
    far_p, far_q = torch.where(near, 2.0, p), torch.where(near, 1.0, q)
    difference = far_p * far_p - far_q * far_q
    s, t = terms
    rest_p, rest_q = torch.exp(-far_p), torch.exp(-far_q)
    closed = _evaluate(s, far_p) * rest_p + _evaluate(s, far_q) * rest_q
    split = _evaluate(t, far_p) * rest_p - _evaluate(t, far_q) * rest_q
    closed = (closed + 2 * split / difference) / difference**2

    middle, squared = torch.where(near, x, 1.0), torch.where(near, y * y, 0.0)
    series = torch.zeros_like(middle)
    for coefficient in reversed(powers):
        series = series * squared + _evaluate(coefficient, middle)
    return torch.where(near, series * torch.exp(-middle), closed)


@functools.cache
def _series(terms: Callable[[int], Terms], n: int) -> tuple[Laurent, ...]:
    """Coefficients of the powers of y^2, over exp(-x)."""
    s, t = terms(n)
    found = []
    for k in range(1, _ORDER + 1):
        total: dict[int, Fraction] = {}
        for power, c in _derivative(s, 2 * k).items():
            total[power - 2] = total.get(power - 2, Fraction(0)) + c / (8 * math.factorial(2 * k))
        for power, c in _derivative(t, 2 * k + 1).items():
            factor = 16 * math.factorial(2 * k + 1)
            total[power - 3] = total.get(power - 3, Fraction(0)) + c / factor
        found.append(total)
    return tuple(found)


def _derivative(polynomial: Laurent, order: int) -> Laurent:
    """Derivatives of a Laurent polynomial times exp(-x), over exp(-x)."""
    for _ in range(order):
        slope: dict[int, Fraction] = {}
        for power, c in polynomial.items():
            slope[power] = slope.get(power, Fraction(0)) - c
            if power:
                slope[power - 1] = slope.get(power - 1, Fraction(0)) + power * c
        polynomial = slope
    return polynomial


def _polynomial(coefficients: tuple[str, ...]) -> Laurent:
    return {power: Fraction(c) for power, c in enumerate(coefficients)}


def _shifted(polynomial: Laurent, by: int) -> Laurent:
    return {power + by: c for power, c in polynomial.items()}


def _evaluate(polynomial: Laurent, x: Tensor) -> Tensor:
    lowest, highest = min(polynomial), max(polynomial)
    total = torch.full_like(x, float(polynomial[highest]))
    for power in range(highest - 1, lowest - 1, -1):
        total = total * x + float(polynomial.get(power, 0))
    return total * x**lowest if lowest else total
