"""Problems with exact gradients, and a move on a line; shared by tests of Monte Carlo gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mdgraft.montecarlo import (
    HMC,
    MALA,
    ChainState,
    Displacement,
    InsertionDeletion,
    Metropolis,
    Proposal,
    SiteChange,
    Target,
    Volume,
)
from mdgraft.montecarlo.moves import AbstractGaussianMove
from mdgraft.montecarlo.moves.base import normal
from mdgraft.testsystems import (
    GaussianTarget,
    GrandCanonicalIdealGas,
    HarmonicOscillators,
    IdealGas,
    IsingLattice,
    LangmuirSites,
)


class LineStep(AbstractGaussianMove):
    """A normal step of the first coordinate of the only particle."""

    def __init__(self, scale, *, name=None):
        super().__init__(name=name, scale=scale)

    def check(self, state, target):
        assert state.n_particles == 1

    def draw(self, state, generator):
        return {"normal": normal(state, generator, 1, 1)}

    def mean(self, state, target):
        return state.positions[:, :, :1]

    def deviation(self, state, target):
        return self.scale.to(state.positions)

    def apply(self, state, noise, target):
        new = self.mean(state, target) + self.deviation(state, target) * noise["normal"]
        return Proposal(
            state=state.replace(positions=torch.cat([new, state.positions[:, :, 1:]], dim=2)),
            log_ratio=noise["normal"].new_zeros(state.n_chains),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Equilibrated chains, an observable, and its exact gradient."""

    sampler: Metropolis
    observable: Callable[[ChainState], Any]
    value: Any
    gradient: Mapping[str, Any]
    n_samples: int = 150


def gaussian(move, n_chains=64):
    system = GaussianTarget(center=0.4, n_dimensions=3)
    generator = torch.Generator().manual_seed(11)
    state = ChainState(positions=system.sample(n_chains, generator=generator).positions)
    sampler = Metropolis(
        Target(system.potential, temperature=system.temperature), move, state, seed=5
    )
    return Problem(
        sampler=sampler,
        observable=lambda s: torch.stack(
            [s.positions[:, 0].mean(dim=1), s.positions[:, 0].square().mean(dim=1)], dim=1
        ),
        value=[0.4, 1.16],
        gradient={"well.center": [1.0, 0.8]},
    )


def harmonic(move, n_chains=64):
    system = HarmonicOscillators(2, center=0.1, k=2.5)
    generator = torch.Generator().manual_seed(12)
    state = ChainState(positions=system.sample(n_chains, generator=generator).positions)
    sampler = Metropolis(
        Target(system.potential, temperature=system.temperature), move, state, seed=6
    )
    exact = system.mean_square_gradient()
    # Both bound coordinates of the energy: <U> does not depend on k.
    return Problem(
        sampler=sampler,
        observable=lambda s: torch.stack(
            [s.positions.square().mean(dim=(1, 2)), system.potential(s.positions, None)], dim=1
        ),
        value=[system.mean_square(), system.mean_energy()],
        gradient={"wells.k": [exact["wells.k"], 0.0], "wells.center": [exact["wells.center"], 0.0]},
    )


def ising():
    lattice = IsingLattice((2, 3), coupling=0.25, field=0.3, temperature=1.0 / 0.00831446261815324)

    def observable(state):
        return state.discrete["spins"].double().mean(dim=1)

    state = lattice.sample(64, generator=torch.Generator().manual_seed(13))
    sampler = Metropolis(
        Target(lattice.energy, temperature=lattice.temperature),
        SiteChange("spins", (-1, 1)),
        state,
        seed=7,
    )
    exact = lattice.gradient(observable)
    return Problem(
        sampler=sampler,
        observable=observable,
        value=float(lattice.mean(observable).detach()),
        gradient={name: float(value) for name, value in exact.items()},
        n_samples=300,
    )


def langmuir():
    sites = LangmuirSites(4, epsilon=-0.8, activity=0.4)
    sampler = Metropolis(
        Target(sites.energy, temperature=sites.temperature, log_activity=math.log(sites.activity)),
        SiteChange("present"),
        sites.sample(64, generator=torch.Generator().manual_seed(14)),
        seed=8,
    )
    by_mu = 4 * sites.mean_occupancy_chemical_potential_derivative()
    return Problem(
        sampler=sampler,
        observable=lambda s: s.numbers.double(),
        value=4 * sites.mean_occupancy(),
        gradient={
            "epsilon": 4 * sites.mean_occupancy_gradient()["epsilon"],
            "chemical_potential": by_mu,
            "log_activity": by_mu / sites.beta,
        },
        n_samples=300,
    )


def grand_canonical():
    gas = GrandCanonicalIdealGas(volume=8.0, activity=0.4, epsilon=0.7)
    sampler = Metropolis(
        Target(gas.energy, temperature=gas.temperature, log_activity=math.log(gas.activity)),
        InsertionDeletion(),
        gas.sample(64, generator=torch.Generator().manual_seed(15)),
        seed=9,
    )
    by_mu = gas.mean_number_chemical_potential_derivative()
    return Problem(
        sampler=sampler,
        observable=lambda s: s.numbers.double(),
        value=gas.mean_number(),
        gradient={
            "epsilon": gas.mean_number_gradient()["epsilon"],
            "chemical_potential": by_mu,
            "log_activity": by_mu / gas.beta,
        },
        n_samples=300,
    )


def isobaric():
    gas = IdealGas(4, pressure=60.0)
    frames = gas.sample(64, generator=torch.Generator().manual_seed(16))
    sampler = Metropolis(
        Target(gas.potential, temperature=gas.temperature, pressure=gas.pressure),
        Volume(0.7),
        ChainState(positions=frames.positions, box=frames.box),
        seed=10,
    )
    return Problem(
        sampler=sampler,
        observable=lambda s: torch.linalg.det(s.box),
        value=gas.volume_moment(),
        gradient={
            "squeeze.tension": gas.mean_volume_gradient()["squeeze.tension"],
            "pressure": gas.mean_volume_pressure_derivative(),
            "temperature": gas.mean_volume_temperature_derivative(),
        },
        n_samples=200,
    )


PROBLEMS = {
    "gaussian": lambda: gaussian(Displacement(1.3)),
    "gaussian-mala": lambda: gaussian(MALA(1.2)),
    "harmonic-hmc": lambda: harmonic(HMC(0.3, 4)),
    "harmonic-displacement": lambda: harmonic(Displacement(1.3)),
    "ising": ising,
    "langmuir": langmuir,
    "grand-canonical": grand_canonical,
    "isobaric": isobaric,
}
