"""Special functions of Ewald sums, smooth through zero distance to every order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ERF_TERMS = 12
_DISPERSION_TERMS = 18


def erf_over_root(u: Tensor) -> Tensor:
    """``erf(sqrt(u)) / sqrt(u)`` for u >= 0, analytic at zero.

    Series: 2/sqrt(pi) sum_n (-u)^n / (n! (2n + 1)).
    """
    small = u < 0.1
    near = torch.where(small, u, 0.0)
    series = torch.zeros_like(near)
    for n in reversed(range(_ERF_TERMS)):
        coefficient = (-1) ** n / (math.factorial(n) * (2 * n + 1))
        series = series * near + coefficient
    root = torch.sqrt(torch.where(small, 1.0, u))
    return torch.where(small, 2 / math.sqrt(math.pi) * series, torch.erf(root) / root)


def dispersion_damping(x: Tensor) -> Tensor:
    """``[1 - exp(-x)(1 + x + x^2/2)] / x^3`` for x >= 0, analytic at zero.

    With x = (alpha r)^2 this, times alpha^6, is the part of r^-6 that the reciprocal sum holds
    (Essmann et al., J. Chem. Phys. 103, 8577 (1995), eq. 5.3). Series: exp(-x) sum_k x^k/(k + 3)!.
    """
    small = x < 1.0
    near = torch.where(small, x, 0.0)
    series = torch.zeros_like(near)
    for k in reversed(range(_DISPERSION_TERMS)):
        series = series * near + 1 / math.factorial(k + 3)
    far = torch.where(small, 1.0, x)
    closed = (1 - torch.exp(-far) * (1 + far + 0.5 * far * far)) / far**3
    return torch.where(small, torch.exp(-near) * series, closed)
