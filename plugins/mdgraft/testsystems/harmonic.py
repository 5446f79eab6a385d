"""Independent harmonic oscillators."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._units import BOLTZMANN, BOND_FORCE_CONSTANT, NANOMETER
from mdgraft.frames import Frames
from mdgraft.potentials import AbstractTerm, Potential
from mdgraft.testsystems._chains import autoregressive


class _HarmonicWells(AbstractTerm):
    def __init__(self, center: float, k: float) -> None:
        super().__init__(periodic=False)
        self.add_parameter("center", torch.tensor(center, dtype=torch.float64), NANOMETER)
        self.add_parameter("k", torch.tensor(k, dtype=torch.float64), BOND_FORCE_CONSTANT)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        squared = (positions - values["center"]) ** 2
        return 0.5 * values["k"] * squared.sum(dim=(-2, -1))


class HarmonicOscillators:
    """Particles in equal isotropic wells, ``U = k/2 sum (x - center)^2`` over 3N coordinates.

    Each coordinate is normal with mean ``center`` and variance ``kT / k``, so that averages, their
    derivatives and effective sample sizes have closed forms.

    Parameters
    ----------
    n_particles
        N.
    center
        Of the wells, the same along x, y and z [nm].
    k
        Force constant [kJ/mol/nm^2].
    temperature
        [K].

    Attributes
    ----------
    potential
        A new `Potential` with the parameters ``wells.center`` and ``wells.k``.

    Raises
    ------
    InvalidInputError
        For a force constant or temperature that is not positive.
    """

    def __init__(
        self, n_particles: int = 1, *, center: float = 0.0, k: float, temperature: float = 300.0
    ) -> None:
        for name, value in (("n_particles", n_particles), ("k", k), ("temperature", temperature)):
            if not (math.isfinite(value) and value > 0):
                raise InvalidInputError(f"{name}: got {value!r}, wanted a positive number")
        self.n_particles = n_particles
        self.center = center
        self.k = k
        self.temperature = temperature
        self.potential = Potential({"wells": _HarmonicWells(center, k)}, n_particles=n_particles)

    @property
    def variance(self) -> float:
        """Variance of a coordinate, ``kT / k`` [nm^2]."""
        return BOLTZMANN * self.temperature / self.k

    @property
    def n_degrees_of_freedom(self) -> int:
        """Number of independent coordinates, 3N."""
        return 3 * self.n_particles

    def sample(
        self,
        n_frames: int,
        *,
        correlation: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Frames:
        """Exact samples; successive frames correlate as an Ornstein-Uhlenbeck process does.

        Parameters
        ----------
        n_frames
            F.
        correlation
            Of a coordinate with itself one frame later, in (-1, 1).
        generator
            Source of random numbers.
        """
        chain = autoregressive(
            n_frames, (self.n_particles, 3), correlation=correlation, generator=generator
        )
        return Frames(positions=self.center + math.sqrt(self.variance) * chain, sampled="NVT")

    # Closed forms -----------------------------------------------------------------------------

    def mean_square(self) -> float:
        """``<x^2>`` of a coordinate [nm^2]."""
        return self.center**2 + self.variance

    def mean_position_gradient(self) -> dict[str, float]:
        """Derivatives of ``<x>`` by parameter name."""
        return {"wells.center": 1.0, "wells.k": 0.0}

    def mean_square_gradient(self) -> dict[str, float]:
        """Derivatives of ``<x^2>`` by parameter name."""
        return {"wells.center": 2.0 * self.center, "wells.k": -self.variance / self.k}

    def mean_energy(self) -> float:
        """``<U> = 3N kT / 2`` [kJ/mol], whatever the parameters."""
        return 0.5 * self.n_degrees_of_freedom * BOLTZMANN * self.temperature

    def kish_fraction(self, ratio: float) -> float:
        """Kish effective sample size over F, for many frames, when k becomes ``ratio * k``.

        ``[sqrt(2 r - 1) / r]^{3N}``; zero for ``r <= 1/2``, where the weights have no variance.
        """
        if ratio <= 0.5:
            return 0.0
        return (math.sqrt(2.0 * ratio - 1.0) / ratio) ** self.n_degrees_of_freedom

    def entropy_fraction(self, ratio: float) -> float:
        """Entropic sample size over F, for many frames, when k becomes ``ratio * k``."""
        divergence = 0.5 * (1.0 / ratio - 1.0 + math.log(ratio))
        return math.exp(-self.n_degrees_of_freedom * divergence)
