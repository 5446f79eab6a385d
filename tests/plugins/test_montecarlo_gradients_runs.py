"""Estimates that are stored half way and go on: bit by bit those that were never interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mdgraft import Estimate, InvalidInputError
from mdgraft.montecarlo import (
    MALA,
    ULA,
    ChainState,
    Displacement,
    InsertionDeletion,
    Metropolis,
    Mixture,
    Rotation,
    Sequence,
    SiteChange,
    Target,
    Torsion,
    Volume,
)
from mdgraft.montecarlo.gradients import Coupled, PastBaseline, Reparameterized, Score
from mdgraft.montecarlo.gradients.run import AbstractPathGradient
from montecarlo_laws import F64, TEMPERATURE, generator


class Wells(torch.nn.Module):
    """Harmonic wells about a centre, as a user might write them."""

    def __init__(self) -> None:
        super().__init__()
        self.center = torch.nn.Parameter(torch.tensor(0.1, dtype=F64))
        self.k = torch.nn.Parameter(torch.tensor([300.0, 500.0, 200.0], dtype=F64))

    def forward(self, state: ChainState) -> torch.Tensor:
        return 0.5 * (self.k * (state.positions - self.center).square()).sum(dim=(-2, -1))


class Lattice(torch.nn.Module):
    """Spins in a field."""

    def __init__(self) -> None:
        super().__init__()
        self.field = torch.nn.Parameter(torch.tensor([0.5, 1.5, 1.0], dtype=F64))

    def forward(self, state: ChainState) -> torch.Tensor:
        spins = state.discrete["spins"].double()
        return (self.field * spins).sum(dim=1) - (spins[:, 1:] * spins[:, :-1]).sum(dim=1)


def particles(moves: Any, pressure: float | None = None) -> Callable[[int], Metropolis]:
    def made(seed: int) -> Metropolis:
        x = 0.1 + 0.1 * torch.randn(6, 4, 3, generator=generator(3), dtype=F64)
        box = torch.eye(3, dtype=F64).expand(6, 3, 3).clone()
        return Metropolis(
            Target(Wells(), temperature=TEMPERATURE, pressure=pressure),
            moves(),
            ChainState(positions=x, box=box),
            seed=seed,
        )

    return made


def lattice(seed: int) -> Metropolis:
    state = ChainState(
        positions=torch.zeros(6, 0, 3, dtype=F64),
        discrete={"spins": torch.randint(0, 2, (6, 3), generator=generator(1))},
    )
    return Metropolis(
        Target(Lattice(), temperature=TEMPERATURE), SiteChange("spins"), state, seed=seed
    )


def numbers(seed: int) -> Metropolis:
    state = ChainState(
        positions=torch.rand(6, 8, 3, generator=generator(1), dtype=F64),
        box=torch.eye(3, dtype=F64).expand(6, 3, 3).clone(),
        present=torch.rand(6, 8, generator=generator(2)) < 0.4,
    )
    target = Target(
        lambda s: s.positions.new_zeros(s.n_chains), temperature=300.0, log_activity=1.0
    )
    return Metropolis(target, InsertionDeletion(truncate=True), state, seed=seed)


def coordinates(state: ChainState) -> torch.Tensor:
    return state.positions.reshape(state.n_chains, -1)[:, :5]


def spins(state: ChainState) -> torch.Tensor:
    return state.discrete["spins"].double()


def count(state: ChainState) -> torch.Tensor:
    return state.numbers.double()


class WithEnergy:
    """An observable that depends on parameters itself."""

    def __init__(self, sampler: Metropolis) -> None:
        self.energy: Any = sampler.target.energy

    def __call__(self, state: ChainState) -> torch.Tensor:
        return self.energy(state)


BONDS = [(0, 1), (1, 2), (2, 3)]

RUNS: dict[str, tuple[Callable[[int], Metropolis], Any, AbstractPathGradient, dict[str, Any]]] = {
    "branches": (
        particles(lambda: Mixture([Displacement(0.1), Torsion(0.8, BONDS)])),
        coordinates,
        Coupled(warm_up=3),
        {},
    ),
    "branches that are cut": (
        particles(lambda: Sequence([Displacement(0.1, together=True), Rotation(0.5, [[0, 1]])])),
        WithEnergy,
        Coupled(max_age=2, seed=5),
        {"stride": 2},
    ),
    "branches at constant pressure": (
        particles(lambda: Sequence([Displacement(0.1), Volume(0.2)]), 50.0),
        coordinates,
        Coupled(),
        {"parameters": ["k", "pressure", "temperature"]},
    ),
    "branches of a lattice": (lattice, spins, Coupled(warm_up=2), {}),
    "branches of numbers": (numbers, count, Coupled(), {"parameters": ["log_activity"]}),
    "tangents": (particles(lambda: MALA(0.05)), coordinates, Reparameterized(warm_up=2), {}),
    "tangents and scales": (
        particles(lambda: Mixture([MALA(0.05), Displacement(0.05)])),
        WithEnergy,
        Reparameterized(tolerance=1e-6),
        {"parameters": ["center", "MALA.scale"], "stride": 2},
    ),
    "tangents without a test": (particles(lambda: ULA(0.04)), coordinates, Reparameterized(), {}),
    "score": (
        particles(lambda: Mixture([Displacement(0.1), Torsion(0.8, BONDS)])),
        WithEnergy,
        Score(window=3),
        {"stride": 2, "parameters": ["center", "Torsion.scale"]},
    ),
    "score since the start": (
        particles(lambda: MALA(0.05)),
        coordinates,
        Score(window=None, baseline=PastBaseline()),
        {},
    ),
    "score of a lattice": (lattice, spins, Score(window=2), {}),
}


def equal(first: Estimate, second: Estimate) -> None:
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.standard_error, second.standard_error)
    assert first.gradient.keys() == second.gradient.keys()
    for name in first.gradient:
        assert torch.equal(first.gradient[name], second.gradient[name]), name
        assert torch.equal(
            first.gradient_standard_error[name], second.gradient_standard_error[name]
        ), name
    assert (first.method, first.bias, first.n_frames) == (
        second.method,
        second.bias,
        second.n_frames,
    )


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("before", [0, 7])
def test_a_stored_estimate_goes_on_as_if_never_stopped(
    name: str, before: int, tmp_path: Path
) -> None:
    sampler, observable, gradient, options = RUNS[name]

    def begun(seed: int) -> Any:
        chains = sampler(seed)
        what = observable(chains) if isinstance(observable, type) else observable
        return gradient.begin(chains, what, **options)

    whole, stopped, other = begun(1), begun(1), begun(2)
    if before:
        stopped.advance(before)
    stopped.save(tmp_path / "run.npz")
    # What the other run has seen must not matter.
    other.advance(3)
    other.load(tmp_path / "run.npz")
    other.advance(20 - before)
    whole.advance(20)
    equal(other.estimate(), whole.estimate())
    for key, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    chains = sampler(1)
    what = observable(chains) if isinstance(observable, type) else observable
    equal(gradient.estimate(chains, what, 20, **options), whole.estimate())
    assert any(bool(g.abs().any()) for g in whole.estimate().gradient.values())
    if hasattr(whole, "result"):
        mine, others = whole.result().coalescence, other.result().coalescence
        assert torch.equal(mine.lifetimes, others.lifetimes)
        assert (mine.n_alive, mine.n_cut) == (others.n_alive, others.n_cut)


def test_parts_that_nobody_chose_do_not_change_how_derivatives_are_taken() -> None:
    # With few chains most updates are without the part whose scale is asked for.
    chains = particles(lambda: Mixture([MALA(0.05), Displacement(0.05)], [0.02, 0.98]))(1)
    run: Any = Reparameterized().begin(chains, coordinates, parameters=["center", "MALA.scale"])
    run.advance(40)
    assert 0 < int(chains.statistics["MALA"].attempts.sum()) < 40
    assert not run._tangents._by_differences


def test_estimates_may_be_looked_at_on_the_way() -> None:
    sampler, observable, gradient, options = RUNS["branches"]
    run = gradient.begin(sampler(1), observable, **options)
    with pytest.raises(InvalidInputError, match=r"no samples yet; call advance"):
        run.estimate()
    errors = []
    for _ in range(3):
        run.advance(40)
        errors.append(float(run.estimate().standard_error.mean()))
    assert run.estimate().n_frames == 6 * 120
    assert errors[2] < errors[0]
    for count in (0, 1.5, True):
        with pytest.raises(InvalidInputError, match="n_samples: got"):
            run.advance(count)  # type: ignore[arg-type]


ESTIMATORS: dict[str, tuple[AbstractPathGradient, Any]] = {
    "branches": (Coupled(), lambda: Displacement(0.1)),
    "score": (Score(baseline=PastBaseline()), lambda: Displacement(0.1)),
    "tangents": (Reparameterized(), lambda: MALA(0.03)),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_chains_that_others_have_changed_are_refused(name: str) -> None:
    gradient, moves = ESTIMATORS[name]
    chains = particles(moves)(1)
    run = gradient.begin(chains, coordinates)
    run.advance(2)
    stored = run.state_dict()
    chains.step()
    with pytest.raises(InvalidInputError, match="sampler: its chains were left after"):
        run.advance(2)
    run.load_state_dict(stored)
    run.advance(2)
    wells: Any = chains.target.energy
    with torch.no_grad():
        wells.k.mul_(1.5)
    with pytest.raises(InvalidInputError, match="target: its energy has changed"):
        run.advance(2)
    with pytest.raises(InvalidInputError, match="target: its energy has changed"):
        run.load_state_dict(stored)


def test_states_of_other_estimates_are_refused(tmp_path: Path) -> None:
    sampler = particles(lambda: Displacement(0.1))
    run = Coupled().begin(sampler(1), coordinates)
    run.advance(2)
    stored = run.state_dict()
    for other, match in (
        (Score().begin(sampler(1), coordinates), "not those of this estimator"),
        (Coupled().begin(sampler(1), coordinates, parameters=["k"]), "hold the parameters center"),
        (Coupled().begin(sampler(1), coordinates, stride=2), "hold the stride 1, wanted .* 2"),
        (Coupled().begin(sampler(1), lambda s: s.positions[:, 0, 0]), "samples of values of shape"),
        (
            Coupled().begin(particles(lambda: Displacement(0.1, name="other"))(1), coordinates),
            "not those of these moves",
        ),
    ):
        with pytest.raises(InvalidInputError, match=match):
            other.load_state_dict(stored)
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    with pytest.raises(InvalidInputError, match="broken"):
        run.load(tmp_path / "broken.npz")
