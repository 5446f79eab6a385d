"""A particle in a Gaussian well, and random-walk Metropolis on it in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from scipy import integrate, optimize, special
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._units import BOLTZMANN, NANOMETER
from mdgraft.frames import Frames
from mdgraft.potentials import AbstractTerm, Potential
from mdgraft.testsystems._chains import autoregressive


class _Well(AbstractTerm):
    """``U = kT/2 sum_d (x_d - center)^2`` over the first n coordinates; the others are free."""

    def __init__(self, center: float, kt: float, n_dimensions: int) -> None:
        super().__init__(periodic=False)
        self.kt = kt
        self.n_dimensions = n_dimensions
        self.add_parameter("center", torch.tensor(center, dtype=torch.float64), NANOMETER)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        bound = positions[..., : self.n_dimensions] - values["center"]
        return 0.5 * self.kt * bound.square().sum(dim=(-2, -1))


class GaussianTarget:
    """One particle whose first n coordinates are normal with mean ``center`` and unit variance.

    The other coordinates feel no force, so that with ``n_dimensions=1`` a random walk in space
    is accepted as a random walk on a line is. The performance of random-walk Metropolis with
    normal proposals of standard deviation s is known: with r the length of the proposed jump,
    ``E[alpha | r] = erfc(r / 2 sqrt(2))`` in the stationary chain.

    Parameters
    ----------
    center
        Mean of each bound coordinate [nm].
    n_dimensions
        How many coordinates are bound, from 1 to 3.
    temperature
        [K]; changes the energy scale only.

    Attributes
    ----------
    potential
        A new `Potential` with the parameter ``well.center``.

    Raises
    ------
    InvalidInputError
        For another number of dimensions or a temperature that is not positive.
    """

    def __init__(
        self, *, center: float = 0.0, n_dimensions: int = 1, temperature: float = 300.0
    ) -> None:
        if n_dimensions not in (1, 2, 3):
            raise InvalidInputError(f"n_dimensions: got {n_dimensions!r}, wanted 1, 2 or 3")
        if not (math.isfinite(temperature) and temperature > 0):
            raise InvalidInputError(f"temperature: got {temperature!r}, wanted a positive number")
        self.center = center
        self.n_dimensions = n_dimensions
        self.temperature = temperature
        well = _Well(center, BOLTZMANN * temperature, n_dimensions)
        self.potential = Potential({"well": well}, n_particles=1)

    def sample(
        self,
        n_frames: int,
        *,
        correlation: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Frames:
        """Exact samples ``(n_frames, 1, 3)``; free coordinates are normal around zero.

        Successive frames correlate by ``correlation``, in (-1, 1).
        """
        chain = autoregressive(n_frames, (1, 3), correlation=correlation, generator=generator)
        chain[..., : self.n_dimensions] += self.center
        return Frames(positions=chain, sampled="NVT")

    # Closed forms -----------------------------------------------------------------------------

    def mean_position_gradient(self) -> dict[str, float]:
        """Derivative of ``<x>`` by parameter name."""
        return {"well.center": 1.0}

    def mean_square_gradient(self) -> dict[str, float]:
        """Derivative of ``<x^2>`` by parameter name [nm]."""
        return {"well.center": 2.0 * self.center}

    def acceptance(self, scale: float) -> float:
        """Mean acceptance of normal proposals of this standard deviation [nm]."""
        return self._average(lambda r: special.erfc(scale * r / (2.0 * math.sqrt(2.0))))

    def squared_jump(self, scale: float) -> float:
        """Expected squared jumping distance of the bound coordinates [nm^2]."""
        return self._average(
            lambda r: (scale * r) ** 2 * special.erfc(scale * r / (2.0 * math.sqrt(2.0)))
        )

    def autocovariance(self, scale: float) -> float:
        """Autocovariance of one coordinate a step apart, ``1 - squared_jump / 2 n`` [nm^2]."""
        return 1.0 - 0.5 * self.squared_jump(scale) / self.n_dimensions

    def autocovariance_derivative(self, scale: float) -> float:
        """Derivative of `autocovariance` with respect to the proposal's standard deviation."""

        def integrand(r: float) -> float:
            u = scale * r / (2.0 * math.sqrt(2.0))
            first = 2.0 * scale * r * r * special.erfc(u)
            second = (scale * r) ** 2 * (-2.0 / math.sqrt(math.pi)) * math.exp(-u * u) * u / scale
            return float(first + second)

        return -0.5 * self._average(integrand) / self.n_dimensions

    def optimal_scale(self) -> float:
        """The standard deviation of proposals with the least autocovariance [nm]."""
        found = optimize.brentq(self.autocovariance_derivative, 0.5, 6.0, xtol=1e-12)
        return float(found)

    def _average(self, function: object) -> float:
        """Average over the length r of a standard normal vector in n dimensions."""
        n = self.n_dimensions
        norm = 2.0 ** (n / 2.0 - 1.0) * math.gamma(n / 2.0)

        def integrand(r: float) -> float:
            return float(function(r) * r ** (n - 1) * np.exp(-0.5 * r * r) / norm)  # type: ignore[operator]

        value, _ = integrate.quad(integrand, 0.0, np.inf, epsabs=1e-13, epsrel=1e-12)
        return float(value)
