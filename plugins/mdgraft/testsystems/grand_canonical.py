"""The ideal gas in contact with a reservoir of particles."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft._units import BOLTZMANN
from mdgraft.montecarlo.state import ChainState


class PerParticleEnergy(nn.Module):
    """``U = epsilon N``: the same energy for each particle.

    Parameters
    ----------
    epsilon
        [kJ/mol]; a trainable parameter of this name.
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = nn.Parameter(torch.tensor(epsilon, dtype=torch.float64))

    def forward(self, state: ChainState) -> Tensor:
        """Energies ``(C,)`` [kJ/mol]."""
        return self.epsilon * state.numbers.to(self.epsilon)


class GrandCanonicalIdealGas:
    """Particles without interactions at constant volume, temperature and activity.

    The number of particles is Poisson distributed with mean ``z V exp(-beta epsilon)``, where z is
    the activity [1/nm^3] and epsilon an energy of each particle.

    Parameters
    ----------
    volume
        [nm^3].
    activity
        z [1/nm^3].
    epsilon
        Energy of a particle [kJ/mol].
    temperature
        [K].

    Attributes
    ----------
    energy
        A `PerParticleEnergy` with the parameter ``epsilon``.

    Raises
    ------
    InvalidInputError
        For a volume, activity or temperature that is not positive.
    """

    def __init__(
        self, *, volume: float, activity: float, epsilon: float = 0.0, temperature: float = 300.0
    ) -> None:
        for name, value in (
            ("volume", volume),
            ("activity", activity),
            ("temperature", temperature),
        ):
            if not (math.isfinite(value) and value > 0):
                raise InvalidInputError(f"{name}: got {value!r}, wanted a positive number")
        self.volume = volume
        self.activity = activity
        self.temperature = temperature
        self.energy = PerParticleEnergy(epsilon)

    @property
    def beta(self) -> float:
        """Inverse temperature [mol/kJ]."""
        return 1.0 / (BOLTZMANN * self.temperature)

    def sample(
        self,
        n_chains: int,
        *,
        n_places: int | None = None,
        generator: torch.Generator | None = None,
    ) -> ChainState:
        """Independent exact samples in a cubic box, as the start of so many chains.

        Parameters
        ----------
        n_chains
            C.
        n_places
            How many particles there is room for; by default ten standard deviations above the
            mean, which is not reached.
        generator
            Source of random numbers.
        """
        mean = self.mean_number()
        if n_places is None:
            n_places = math.ceil(mean + 10.0 * math.sqrt(mean)) + 10
        rate = torch.full((n_chains,), mean, dtype=torch.float64)
        numbers = torch.poisson(rate, generator=generator).clamp(max=n_places)
        length = self.volume ** (1.0 / 3.0)
        uniform = torch.rand(n_chains, n_places, 3, generator=generator, dtype=torch.float64)
        return ChainState(
            positions=length * uniform,
            box=(length * torch.eye(3, dtype=torch.float64)).repeat(n_chains, 1, 1),
            present=torch.arange(n_places) < numbers[:, None],
        )

    # Closed forms -----------------------------------------------------------------------------

    def mean_number(self) -> float:
        """``<N> = z V exp(-beta epsilon)``."""
        epsilon = float(self.energy.epsilon.detach())
        return self.activity * self.volume * math.exp(-self.beta * epsilon)

    def number_variance(self) -> float:
        """``Var(N) = <N>``."""
        return self.mean_number()

    def mean_number_gradient(self) -> dict[str, float]:
        """Derivative ``-beta <N>`` by parameter name [mol/kJ]."""
        return {"epsilon": -self.beta * self.mean_number()}

    def mean_number_chemical_potential_derivative(self) -> float:
        """``d<N>/dmu = beta Var(N)`` [mol/kJ]."""
        return self.beta * self.number_variance()
