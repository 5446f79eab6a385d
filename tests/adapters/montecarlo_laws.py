"""Exact laws of small systems, and samples of them, for tests of Monte Carlo moves."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from mdgraft._units import BAR_NM3, BOLTZMANN
from mdgraft.montecarlo import ChainState, Target
from torch import Tensor

TEMPERATURE = 300.0
KT = BOLTZMANN * TEMPERATURE
F64 = torch.float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """A target, exact independent samples of it, and averages in closed form."""

    target: Target
    sample: Callable[[int, torch.Generator], ChainState]
    #: Quantities ``state -> (C,)`` with their exact means.
    means: dict[str, tuple[Callable[[ChainState], Tensor], float]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wells(k: float = 400.0, n: int = 2, center: float = 0.1) -> Law:
    """Harmonic wells; anisotropic, so that directions are told apart."""
    stiffness = k * torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    def energy(state: ChainState) -> Tensor:
        return 0.5 * (stiffness * (state.positions - center) ** 2).sum(dim=(-2, -1))

    def sample(n_chains: int, rng: torch.Generator) -> ChainState:
        xi = torch.randn(n_chains, n, 3, generator=rng, dtype=F64)
        return ChainState(positions=center + xi * (KT / stiffness).sqrt())

    means: dict[str, tuple[Callable[[ChainState], Tensor], float]] = {
        "U": (energy, 1.5 * n * KT),
        "x": (lambda s: s.positions.mean(dim=(-2, -1)), center),
    }
    for axis in range(3):
        means[f"var {axis}"] = (
            lambda s, a=axis: (s.positions[..., a] - center).square().mean(dim=-1),
            KT / float(stiffness[axis]),
        )
    return Law(target=Target(energy, temperature=TEMPERATURE), sample=sample, means=means)


def dipole(field: float = 5.0) -> Law:
    """A rigid dumbbell in a field: ``<cos> = coth(b) - 1/b`` with ``b = field / kT``."""
    b = field / KT

    def cosine(state: ChainState) -> Tensor:
        arm = state.positions[:, 1] - state.positions[:, 0]
        return arm[:, 2] / arm.norm(dim=-1)

    def sample(n_chains: int, rng: torch.Generator) -> ChainState:
        u = torch.rand(n_chains, generator=rng, dtype=F64)
        phi = 2 * math.pi * torch.rand(n_chains, generator=rng, dtype=F64)
        c = (math.exp(-b) + u * 2 * math.sinh(b)).log() / b
        s = (1 - c * c).clamp(min=0.0).sqrt()
        unit = torch.stack((s * phi.cos(), s * phi.sin(), c), dim=-1)
        return ChainState(positions=torch.stack((-0.1 * unit, 0.2 * unit), dim=1))

    langevin = 1 / math.tanh(b) - 1 / b
    return Law(
        target=Target(lambda s: -field * cosine(s), temperature=TEMPERATURE),
        sample=sample,
        means={
            "cos": (cosine, langevin),
            "cos2": (lambda s: cosine(s) ** 2, 1 - 2 * langevin / b),
            "length": (lambda s: (s.positions[:, 1] - s.positions[:, 0]).norm(dim=-1), 0.3),
        },
    )


def dihedral(x: Tensor) -> Tensor:
    """Of four particles ``(C, 4, 3)`` -> ``(C,)`` [rad]."""
    a, b, c = x[:, 1] - x[:, 0], x[:, 2] - x[:, 1], x[:, 3] - x[:, 2]
    n1, n2 = torch.linalg.cross(a, b), torch.linalg.cross(b, c)
    return torch.atan2((a * n2).sum(-1) * b.norm(dim=-1), (n1 * n2).sum(-1))


def torsion(barrier: float = 3.0) -> Law:
    """A chain of four with ``U = -barrier cos phi``: ``<cos phi> = I1 / I0``."""
    b = barrier / KT

    def sample(n_chains: int, rng: torch.Generator) -> ChainState:
        grid = torch.linspace(-math.pi, math.pi, 20001, dtype=F64)
        cumulative = (b * grid.cos()).exp().cumsum(0)
        u = torch.rand(n_chains, generator=rng, dtype=F64) * cumulative[-1]
        phi = grid[torch.searchsorted(cumulative, u).clamp(max=20000)]
        x = torch.zeros(n_chains, 4, 3, dtype=F64)
        x[:, 0] = torch.tensor([0.1, 0.0, -0.05], dtype=F64)
        x[:, 2, 2] = 0.15
        x[:, 3] = torch.stack((0.1 * phi.cos(), 0.1 * phi.sin(), 0.2 + 0 * phi), dim=-1)
        return ChainState(positions=x)

    ratio = float(
        torch.special.i1(torch.tensor(b, dtype=F64)) / torch.special.i0(torch.tensor(b, dtype=F64))
    )
    return Law(
        target=Target(lambda s: -barrier * dihedral(s.positions).cos(), temperature=TEMPERATURE),
        sample=sample,
        means={
            "cos": (lambda s: dihedral(s.positions).cos(), ratio),
            "sin": (lambda s: dihedral(s.positions).sin(), 0.0),
            "bond": (lambda s: (s.positions[:, 3] - s.positions[:, 2]).norm(dim=-1), 0.05**0.5 / 2),
        },
    )


def gas(n: int = 4, atoms: int = 1, pressure: float = 50.0) -> Law:
    """Ideal molecules at constant pressure: ``V ~ Gamma(n + 1, kT / P)``, uniform positions."""
    scale = KT / (pressure * BAR_NM3)

    def volume(state: ChainState) -> Tensor:
        assert state.box is not None
        return torch.linalg.det(state.box)

    def sample(n_chains: int, rng: torch.Generator) -> ChainState:
        gamma = -torch.rand(n_chains, n + 1, generator=rng, dtype=F64).log().sum(dim=1)
        length = (scale * gamma) ** (1 / 3)
        box = length[:, None, None] * torch.tensor(
            [[1.0, 0, 0], [0.2, 1.0, 0], [-0.1, 0.3, 1.0]], dtype=F64
        )
        fractional = torch.rand(n_chains, n, 3, generator=rng, dtype=F64)
        centres = fractional @ box
        offsets = 0.1 * torch.arange(atoms, dtype=F64)[:, None] * torch.ones(3, dtype=F64)
        x = (centres[:, :, None] + offsets).reshape(n_chains, n * atoms, 3)
        return ChainState(positions=x, box=box)

    def first(state: ChainState) -> Tensor:
        """Fractional coordinate of the first molecule's centre along the third vector."""
        assert state.box is not None
        offset = 0.05 * (atoms - 1)
        return (state.positions[:, :atoms].mean(dim=1) - offset)[:, 2] / state.box[:, 2, 2]

    mean = (n + 1) * scale
    return Law(
        target=Target(
            lambda s: s.positions.new_zeros(s.n_chains), temperature=TEMPERATURE, pressure=pressure
        ),
        sample=sample,
        means={
            "V": (volume, mean),
            "V2": (lambda s: volume(s) ** 2, (n + 1) * (n + 2) * scale**2),
            "ln V": (
                lambda s: volume(s).log(),
                float(torch.digamma(torch.tensor(n + 1.0, dtype=F64))) + math.log(scale),
            ),
            "s": (first, 0.5) if atoms == 1 else (lambda s: volume(s) * 0, 0.0),
        },
    )


def grand_canonical(
    z: float = 1.5, depth: float = 2.0, places: int = 30, truncated: int | None = None
) -> Law:
    """Ideal particles, half of the box deeper by ``depth``: two Poisson laws.

    ``<n> = z V (1 + exp(beta depth)) / 2``; truncated at a number of places if asked for.
    """
    lengths = torch.tensor([1.0, 1.2, 1.5], dtype=F64)
    v = float(lengths.prod())
    deep = math.exp(depth / KT)
    rate = z * v * (1 + deep) / 2
    top = truncated if truncated is not None else places

    def inside(state: ChainState) -> Tensor:
        low = torch.remainder(state.positions[..., 0], 1.0) < 0.5
        assert state.present is not None
        return (state.present & low).sum(dim=-1)

    weights = [rate**k / math.factorial(k) for k in range(top + 1)]
    law = torch.tensor(weights, dtype=F64) / sum(weights)

    def sample(n_chains: int, rng: torch.Generator) -> ChainState:
        n = torch.multinomial(law, n_chains, replacement=True, generator=rng)
        present = torch.arange(top)[None] < n[:, None]
        x = torch.rand(n_chains, top, 3, generator=rng, dtype=F64)
        low = torch.rand(n_chains, top, generator=rng, dtype=F64) < deep / (1 + deep)
        x[..., 0] = 0.5 * x[..., 0] + torch.where(low, 0.0, 0.5)
        return ChainState(
            positions=x * lengths,
            box=torch.diag(lengths).expand(n_chains, 3, 3).clone(),
            present=present,
        )

    numbers = torch.arange(top + 1, dtype=F64)
    mean = float((law * numbers).sum())
    return Law(
        target=Target(
            lambda s: -depth * inside(s).double(),
            temperature=TEMPERATURE,
            log_activity=math.log(z),
        ),
        sample=sample,
        means={
            "n": (lambda s: s.numbers.double(), mean),
            "n2": (lambda s: s.numbers.double() ** 2, float((law * numbers**2).sum())),
            "deep": (lambda s: inside(s).double(), mean * deep / (1 + deep)),
        },
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Enumerated:
    """A system of a few states with the exact probability of each."""

    target: Target
    #: Every configuration, one a chain.
    states: ChainState
    #: Number of the configuration of each chain.
    label: Callable[[ChainState], Tensor]
    probabilities: Tensor

    def sample(self, n_chains: int, rng: torch.Generator) -> ChainState:
        picks = torch.multinomial(self.probabilities, n_chains, replacement=True, generator=rng)
        return self.states[picks]


def _boltzmann(target: Target, states: ChainState) -> Tensor:
    return target.log_density(states).softmax(dim=0)


def potts(n_sites: int = 3, n_values: int = 3) -> Enumerated:
    """A ring with a field, as many values as one likes."""
    rows = list(itertools.product(range(n_values), repeat=n_sites))
    spins = torch.tensor(rows)
    field = torch.linspace(0.0, 2.0, n_sites, dtype=F64)

    def energy(state: ChainState) -> Tensor:
        s = state.discrete["spins"]
        return -2.0 * (s == s.roll(1, -1)).double().sum(-1) + (field * s).sum(-1)

    target = Target(energy, temperature=TEMPERATURE)
    states = ChainState(
        positions=torch.zeros(len(rows), 0, 3, dtype=F64), discrete={"spins": spins}
    )
    powers = n_values ** torch.arange(n_sites - 1, -1, -1)
    return Enumerated(
        target=target,
        states=states,
        label=lambda s: (s.discrete["spins"] * powers).sum(-1),
        probabilities=_boltzmann(target, states),
    )


def alloy(variable: bool) -> Enumerated:
    """Five particles on fixed sites, two of one species, two of another and one of a third.

    Exchanged either as values of a variable or as positions.
    """
    kinds = (0, 0, 1, 1, 2)
    field = torch.tensor([0.0, 1.0, 2.5, 0.5, 3.0], dtype=F64)
    coupling = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.5, 0.0], [2.0, 0.0, 1.0]], dtype=F64)

    def of_kinds(s: Tensor) -> Tensor:
        neighbours = coupling[s[:, :-1], s[:, 1:]].sum(-1)
        return (field * s).sum(-1) + neighbours

    if variable:
        rows = sorted(set(itertools.permutations(kinds)))
        states = ChainState(
            positions=torch.zeros(len(rows), 0, 3, dtype=F64),
            discrete={"species": torch.tensor(rows)},
        )

        def on_sites(state: ChainState) -> Tensor:
            return state.discrete["species"]
    else:
        orders = torch.tensor(list(itertools.permutations(range(5))))
        x = torch.zeros(len(orders), 5, 3, dtype=F64)
        x[..., 0] = orders.double()
        states = ChainState(positions=x)

        def on_sites(state: ChainState) -> Tensor:
            order = state.positions[..., 0].round().long().argsort(dim=1)
            return torch.tensor(kinds)[order]

    target = Target(lambda s: of_kinds(on_sites(s)), temperature=TEMPERATURE)
    table = {tuple(row): k for k, row in enumerate(sorted(set(itertools.permutations(kinds))))}

    def label(state: ChainState) -> Tensor:
        return torch.tensor([table[tuple(row)] for row in on_sites(state).tolist()])

    each = _boltzmann(target, states)
    return Enumerated(
        target=target,
        states=states,
        label=label,
        probabilities=each,
    )


def occupied(n_sites: int = 3, z: float = 0.4) -> Enumerated:
    """Sites of a lattice gas whose occupancy is weighted by an activity."""
    rows = torch.tensor(list(itertools.product((False, True), repeat=n_sites)))

    def energy(state: ChainState) -> Tensor:
        assert state.present is not None
        n = state.present.double()
        return -3.0 * (n[:, :-1] * n[:, 1:]).sum(-1)

    target = Target(energy, temperature=TEMPERATURE, log_activity=math.log(z))
    states = ChainState(positions=torch.zeros(len(rows), 0, 3, dtype=F64), present=rows)
    powers = 2 ** torch.arange(n_sites - 1, -1, -1)

    def label(state: ChainState) -> Tensor:
        assert state.present is not None
        return (state.present * powers).sum(-1)

    return Enumerated(
        target=target, states=states, label=label, probabilities=_boltzmann(target, states)
    )
