"""The Ising model on a small periodic lattice, by enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft._units import BOLTZMANN
from mdgraft.montecarlo.state import ChainState
from mdgraft.testsystems._enumeration import all_states, average


class IsingEnergy(nn.Module):
    """``U = -coupling sum_<ij> s_i s_j - field sum_i s_i`` with nearest neighbours, periodic.

    Parameters
    ----------
    shape
        Lengths of the lattice along each direction. A direction of length 2 has each bond twice,
        as the sum over the neighbours in both senses has it.
    coupling, field
        [kJ/mol]; trainable parameters of these names.
    """

    def __init__(self, shape: tuple[int, ...], *, coupling: float, field: float) -> None:
        super().__init__()
        self.shape = shape
        self.coupling = nn.Parameter(torch.tensor(coupling, dtype=torch.float64))
        self.field = nn.Parameter(torch.tensor(field, dtype=torch.float64))

    def forward(self, state: ChainState) -> Tensor:
        """Energies ``(C,)`` [kJ/mol] of chains with ``discrete["spins"]``, -1 and 1."""
        spins = state.discrete["spins"].to(self.coupling)
        grid = spins.reshape(-1, *self.shape)
        bonds = torch.zeros_like(spins[:, 0])
        lattice = tuple(range(1, grid.ndim))
        for direction in lattice:
            bonds = bonds + (grid * grid.roll(1, dims=direction)).sum(dim=lattice)
        return -self.coupling * bonds - self.field * grid.sum(dim=lattice)


class IsingLattice:
    """Spins on a small periodic lattice, with averages by enumeration of all states.

    Parameters
    ----------
    shape
        Lengths of the lattice along each direction; at most 20 sites.
    coupling, field
        [kJ/mol].
    temperature
        [K].

    Attributes
    ----------
    energy
        An `IsingEnergy` with the parameters ``coupling`` and ``field``.
    states
        Every state of the lattice, as that of a chain each, in ``discrete["spins"]``.

    Raises
    ------
    InvalidInputError
        For too many sites, or a temperature that is not positive.
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (3, 3),
        *,
        coupling: float = 1.0,
        field: float = 0.0,
        temperature: float = 300.0,
    ) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise InvalidInputError(f"temperature: got {temperature!r}, wanted a positive number")
        if not shape or min(shape) < 2:
            raise InvalidInputError(f"shape: got {shape!r}, wanted lengths of at least 2")
        self.shape = tuple(shape)
        self.temperature = temperature
        self.energy = IsingEnergy(self.shape, coupling=coupling, field=field)
        spins = all_states(math.prod(self.shape), (-1, 1))
        self.states = ChainState(
            positions=torch.zeros(len(spins), 0, 3, dtype=torch.float64), discrete={"spins": spins}
        )

    @property
    def beta(self) -> float:
        """Inverse temperature [mol/kJ]."""
        return 1.0 / (BOLTZMANN * self.temperature)

    @property
    def n_sites(self) -> int:
        """Number of spins."""
        return math.prod(self.shape)

    def sample(self, n_chains: int, *, generator: torch.Generator | None = None) -> ChainState:
        """Independent exact samples, as the start of so many chains."""
        with torch.no_grad():
            weights = (-self.beta * self.energy(self.states)).softmax(dim=0)
        chosen = torch.multinomial(weights, n_chains, replacement=True, generator=generator)
        return self.states[chosen]

    # Exact answers ----------------------------------------------------------------------------

    def mean(self, observable: Callable[[ChainState], Tensor]) -> Tensor:
        """Average of a function that maps chains to ``(C, *S)``; with a graph."""
        return average(-self.beta * self.energy(self.states), observable(self.states))

    def gradient(self, observable: Callable[[ChainState], Tensor]) -> dict[str, Tensor]:
        """Derivatives of `mean` of an observable ``(C,)`` by parameter name."""
        names = [name for name, _ in self.energy.named_parameters()]
        derivatives = torch.autograd.grad(self.mean(observable), list(self.energy.parameters()))
        return dict(zip(names, derivatives, strict=True))

    def mean_energy(self) -> Tensor:
        """``<U>`` [kJ/mol], with a graph."""
        return self.mean(self.energy)

    def heat_capacity(self) -> Tensor:
        """``beta^2 Var(U)``, in units of Boltzmann's constant, with a graph."""
        variance = self.mean(lambda state: self.energy(state) ** 2) - self.mean_energy() ** 2
        return self.beta**2 * variance
