"""Splines of any degree, in their B-spline coefficients."""

from __future__ import annotations

import torch
from torch import Tensor


def spline(x: Tensor, knots: Tensor, coefficients: Tensor, degree: int) -> Tensor:
    """Value of a spline at every ``x``; its outermost polynomials go on beyond the ends.

    De Boor's algorithm, J. Approx. Theory 6, 50 (1972); differentiable in ``x`` and in the
    coefficients to every order that the degree has.

    Parameters
    ----------
    x
        ``(n,)``.
    knots
        ``(c + degree + 1,)`` in ascending order.
    coefficients
        ``(c,)``.
    degree
        Of the polynomials.
    """
    last = coefficients.shape[-1] - 1

    inner = knots[degree + 1 : last + 1].detach().contiguous()
    left = degree + torch.bucketize(x.detach().contiguous(), inner, right=True)
    d = [coefficients[left - degree + j] for j in range(degree + 1)]
    for r in range(1, degree + 1):
        for j in range(degree, r - 1, -1):
            low, high = knots[left - degree + j], knots[left + 1 + j - r]
            alpha = (x - low) / (high - low)
            d[j] = (1.0 - alpha) * d[j - 1] + alpha * d[j]
    return d[degree]
