"""Adsorption on independent sites."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft._units import BOLTZMANN
from mdgraft.montecarlo.state import ChainState


class LangmuirEnergy(nn.Module):
    """``U = epsilon sum_i n_i`` over sites that are empty or taken.

    Parameters
    ----------
    epsilon
        Energy of an occupied site [kJ/mol]; a trainable parameter of this name.
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = nn.Parameter(torch.tensor(epsilon, dtype=torch.float64))

    def forward(self, state: ChainState) -> Tensor:
        """Energies ``(C,)`` [kJ/mol] of chains whose ``present`` says which sites are taken."""
        return self.epsilon * state.numbers.to(self.epsilon)


class LangmuirSites:
    """Independent sites in contact with a reservoir: ``<n> = 1 / (1 + exp(beta epsilon) / z)``.

    Parameters
    ----------
    n_sites
        Number of sites.
    epsilon
        Energy of an occupied site [kJ/mol].
    activity
        ``z = exp(beta mu)`` of the reservoir.
    temperature
        [K].

    Attributes
    ----------
    energy
        A `LangmuirEnergy` with the parameter ``epsilon``.

    Raises
    ------
    InvalidInputError
        For a number of sites, an activity or a temperature that is not positive.
    """

    def __init__(
        self, n_sites: int, *, epsilon: float, activity: float, temperature: float = 300.0
    ) -> None:
        for name, value in (
            ("n_sites", n_sites),
            ("activity", activity),
            ("temperature", temperature),
        ):
            if not (math.isfinite(value) and value > 0):
                raise InvalidInputError(f"{name}: got {value!r}, wanted a positive number")
        self.n_sites = n_sites
        self.activity = activity
        self.temperature = temperature
        self.energy = LangmuirEnergy(epsilon)

    @property
    def beta(self) -> float:
        """Inverse temperature [mol/kJ]."""
        return 1.0 / (BOLTZMANN * self.temperature)

    @property
    def chemical_potential(self) -> float:
        """``mu = kT ln z`` [kJ/mol]."""
        return math.log(self.activity) / self.beta

    def sample(self, n_chains: int, *, generator: torch.Generator | None = None) -> ChainState:
        """Independent exact samples, as the start of so many chains."""
        uniform = torch.rand(n_chains, self.n_sites, generator=generator, dtype=torch.float64)
        return ChainState(
            positions=torch.zeros(n_chains, 0, 3, dtype=torch.float64),
            present=uniform < self.mean_occupancy(),
        )

    # Closed forms -----------------------------------------------------------------------------

    def mean_occupancy(self) -> float:
        """``<n>`` of a site."""
        epsilon = float(self.energy.epsilon.detach())
        return 1.0 / (1.0 + math.exp(self.beta * epsilon) / self.activity)

    def mean_occupancy_gradient(self) -> dict[str, float]:
        """Derivative ``-beta <n> (1 - <n>)`` by parameter name [mol/kJ]."""
        n = self.mean_occupancy()
        return {"epsilon": -self.beta * n * (1.0 - n)}

    def mean_occupancy_chemical_potential_derivative(self) -> float:
        """``d<n>/dmu = beta <n> (1 - <n>)`` [mol/kJ]."""
        n = self.mean_occupancy()
        return self.beta * n * (1.0 - n)
