"""The ideal gas at constant pressure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._units import BAR_NM3, BOLTZMANN
from mdgraft.frames import Frames
from mdgraft.kernels.periodic import volume
from mdgraft.potentials import AbstractTerm, Potential
from mdgraft.testsystems._chains import autoregressive


class _Squeeze(AbstractTerm):
    """``U = tension * V``: acts as an additional pressure."""

    def __init__(self) -> None:
        super().__init__(periodic=True)
        self.add_parameter(
            "tension", torch.zeros((), dtype=torch.float64), "kilojoule/(nanometer**3*mole)"
        )

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        assert box is not None
        return values["tension"] * volume(box)


class IdealGas:
    """Molecules without interactions at constant pressure and temperature.

    The volume is gamma distributed, ``p(V) ~ V^n exp(-beta P V)`` for n molecules, as a Monte
    Carlo barostat samples it. The potential is zero but has one parameter, ``squeeze.tension``
    [kJ/mol/nm^3], whose energy is ``tension * V``: it shifts the pressure, so that reweighting a
    volume-dependent energy has a closed form.

    Parameters
    ----------
    n_molecules
        n.
    temperature
        [K].
    pressure
        [bar].

    Attributes
    ----------
    potential
        A new `Potential` with the parameter ``squeeze.tension``, at zero.

    Raises
    ------
    InvalidInputError
        For an argument that is not positive.
    """

    def __init__(self, n_molecules: int, *, temperature: float = 300.0, pressure: float) -> None:
        for name, value in (
            ("n_molecules", n_molecules),
            ("temperature", temperature),
            ("pressure", pressure),
        ):
            if not (math.isfinite(value) and value > 0):
                raise InvalidInputError(f"{name}: got {value!r}, wanted a positive number")
        self.n_molecules = n_molecules
        self.temperature = temperature
        self.pressure = pressure
        self.potential = Potential({"squeeze": _Squeeze()}, n_particles=n_molecules)

    @property
    def volume_scale(self) -> float:
        """``kT / P`` [nm^3]."""
        return BOLTZMANN * self.temperature / (self.pressure * BAR_NM3)

    def sample(
        self,
        n_frames: int,
        *,
        correlation: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Frames:
        """Exact samples in cubic boxes.

        A gamma variate is a sum of squares of normal ones, each an AR(1) chain: volumes k frames
        apart correlate by ``correlation^{2 k}``. Positions are independent and uniform.
        """
        chain = autoregressive(
            n_frames, (2 * (self.n_molecules + 1),), correlation=correlation, generator=generator
        )
        volumes = 0.5 * self.volume_scale * chain.square().sum(dim=1)
        lengths = volumes.pow(1.0 / 3.0)[:, None, None]
        uniform = torch.rand(
            n_frames, self.n_molecules, 3, generator=generator, dtype=torch.float64
        )
        box = lengths * torch.eye(3, dtype=torch.float64)
        return Frames(positions=uniform * lengths, box=box, sampled="NPT")

    # Closed forms -----------------------------------------------------------------------------

    def volume_moment(self, order: float = 1.0, *, tension: float = 0.0) -> float:
        """``<V^order>`` [nm^(3 order)] at a value of ``squeeze.tension`` [kJ/mol/nm^3]."""
        scale = BOLTZMANN * self.temperature / (self.pressure * BAR_NM3 + tension)
        shape = self.n_molecules + 1.0
        moment: float = math.exp(math.lgamma(shape + order) - math.lgamma(shape)) * scale**order
        return moment

    def mean_volume_gradient(self) -> dict[str, float]:
        """Derivative of ``<V>`` by parameter name, at zero tension."""
        return {"squeeze.tension": -self.volume_moment() / (self.pressure * BAR_NM3)}

    def mean_volume_temperature_derivative(self) -> float:
        """``d<V>/dT`` [nm^3/K]."""
        return self.volume_moment() / self.temperature

    def mean_volume_pressure_derivative(self) -> float:
        """``d<V>/dP`` [nm^3/bar]."""
        return -self.volume_moment() / self.pressure
