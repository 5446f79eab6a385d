"""Chains: restarts, counting, adaptation, records, refusals, and the way into estimators."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mdgraft import (
    InvalidInputError,
    MissingBoxError,
    SimulationError,
    UnsupportedDerivativeError,
    WrongEnsembleError,
)
from mdgraft.ensembles import standard_error
from mdgraft.montecarlo import (
    HMC,
    MALA,
    ULA,
    AbstractMove,
    ChainState,
    Displacement,
    IdentitySwap,
    InsertionDeletion,
    Metropolis,
    Mixture,
    Recording,
    Rotation,
    Sequence,
    SiteChange,
    Target,
    Torsion,
    Translation,
    Volume,
    transition,
)
from mdgraft.testsystems.harmonic import HarmonicOscillators
from mdgraft.testsystems.ideal_gas import IdealGas
from montecarlo_laws import F64, KT, TEMPERATURE, gas, generator, grand_canonical, potts, wells


def volume_target() -> Target:
    return Target(lambda s: s.positions.new_zeros(s.n_chains), temperature=300.0, pressure=50.0)


# Restarts ---------------------------------------------------------------------------------------

RUNS: list[tuple[str, Callable[[], tuple[Target, ChainState]], Callable[[], AbstractMove]]] = [
    (
        "positions",
        lambda: (wells().target, wells().sample(5, generator(1))),
        lambda: Mixture([Displacement(0.05), MALA(0.05), HMC(0.02, 3)]),
    ),
    (
        "sequence with a move twice",
        lambda: (wells().target, wells().sample(5, generator(1))),
        lambda: Sequence([m := Displacement(0.05), MALA(0.05), m]),
    ),
    (
        "volume",
        lambda: (gas().target, gas().sample(5, generator(1))),
        lambda: Mixture([Volume(0.2), Displacement(0.1)]),
    ),
    (
        "numbers",
        lambda: (grand_canonical().target, grand_canonical().sample(5, generator(1))),
        InsertionDeletion,
    ),
    (
        "lattice",
        lambda: (potts().target, potts().states),
        lambda: Mixture([SiteChange("spins", (0, 1, 2)), IdentitySwap(variable="spins")]),
    ),
]


def same(first: ChainState, second: ChainState) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize(
    ("system", "move"), [(s, m) for _, s, m in RUNS], ids=[name for name, _, _ in RUNS]
)
@pytest.mark.parametrize("during", ["burn-in", "sampling"])
def test_a_stored_run_goes_on_as_if_never_stopped(
    system: Callable[[], tuple[Target, ChainState]],
    move: Callable[[], AbstractMove],
    during: str,
    tmp_path: Path,
) -> None:
    adapt = during == "burn-in"
    whole = Metropolis(*_arguments(system, move), seed=4)
    stopped = Metropolis(*_arguments(system, move), seed=4)
    for _ in range(9):
        stopped.step(adapt=adapt)
    stopped.save(tmp_path / "run.npz")
    continued = Metropolis(*_arguments(system, move), seed=99)
    continued.load(tmp_path / "run.npz")
    for _ in range(9):
        continued.step(adapt=adapt)
    for _ in range(18):
        whole.step(adapt=adapt)
    same(whole.state, continued.state)
    assert whole.scales == continued.scales
    assert whole.state.step == 18
    for name, counts in whole.statistics.items():
        assert torch.equal(counts.attempts, continued.statistics[name].attempts)
        assert torch.equal(counts.acceptances, continued.statistics[name].acceptances)


def _arguments(
    system: Callable[[], tuple[Target, ChainState]], move: Callable[[], AbstractMove]
) -> tuple[Target, AbstractMove, ChainState]:
    target, state = system()
    return target, move(), state


def test_a_state_alone_carries_the_random_stream(tmp_path: Path) -> None:
    law = wells()
    first = Metropolis(law.target, Displacement(0.05), law.sample(3, generator(1)), seed=7)
    first.sample(5)
    first.state.save(tmp_path / "state.npz")
    second = Metropolis(law.target, Displacement(0.05), ChainState.load(tmp_path / "state.npz"))
    assert torch.equal(first.sample(4).positions, second.sample(4).positions)


def test_seeds_make_the_difference() -> None:
    law = wells()
    state = law.sample(3, generator(1))
    runs = [Metropolis(law.target, Displacement(0.05), state, seed=s).sample(5) for s in (0, 0, 1)]
    assert torch.equal(runs[0].positions, runs[1].positions)
    assert not torch.equal(runs[0].positions, runs[2].positions)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", b"hello"])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"path: .*broken"):
        ChainState.load(path)


def test_files_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "objects.npz"
    np.savez(path, positions=np.array([object()], dtype=object), step=np.array(0))
    with pytest.raises(InvalidInputError, match=r"path: .*objects"):
        ChainState.load(path)


def test_states_of_other_runs_are_refused() -> None:
    law = wells()
    chains = Metropolis(law.target, Displacement(0.05), law.sample(3, generator(1)))
    other = Metropolis(law.target, MALA(0.05), law.sample(3, generator(1)))
    with pytest.raises(InvalidInputError, match="not those of these moves"):
        chains.load_state_dict(other.state_dict())
    fewer = Metropolis(law.target, Displacement(0.05), law.sample(2, generator(1)))
    with pytest.raises(InvalidInputError, match="hold positions"):
        chains.load_state_dict(fewer.state_dict())
    values = chains.state.state_dict()
    with pytest.raises(InvalidInputError, match="names"):
        ChainState.from_state_dict(values | {"odd": torch.zeros(1)})


# Counting and adapting --------------------------------------------------------------------------


def test_counts_are_those_of_the_updates() -> None:
    law = wells()
    moves = Mixture(
        [Displacement(0.1), Displacement(0.02), MALA(0.1)], probabilities=[0.5, 0.3, 0.2]
    )
    chains = Metropolis(law.target, moves, law.sample(400, generator(1)), seed=3)
    names = [move.name for move in chains.moves.components]
    assert names == ["Displacement", "Displacement_1", "MALA"]
    tried, taken = torch.zeros(3, 400), torch.zeros(3, 400)
    for _ in range(50):
        for update in chains.step():
            for k in range(3):
                mine = update.transition.component == k
                tried[k] += mine
                taken[k] += mine & update.transition.accepted
    for k, (name, share) in enumerate(zip(names, (0.5, 0.3, 0.2), strict=True)):
        counts = chains.statistics[name]
        assert torch.equal(counts.attempts, tried[k].long())
        assert torch.equal(counts.acceptances, taken[k].long())
        error = math.sqrt(share * (1 - share) / 20_000)
        assert abs(float(counts.attempts.sum()) / 20_000 - share) < 4 * error
        assert bool((counts.acceptance[counts.attempts > 0] <= 1).all())
    chains.reset_statistics()
    assert not any(int(c.attempts.sum()) for c in chains.statistics.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_go_on_by_themselves(copied: Callable[[Metropolis], Metropolis]) -> None:
    target = Target(HarmonicOscillators(n_particles=3, k=300.0).potential, temperature=300.0)
    state = ChainState(positions=torch.zeros(4, 3, 3, dtype=F64))
    moves = Sequence([Displacement(0.1), Mixture([Displacement(0.05, together=True), MALA(0.05)])])
    chains = Metropolis(target, moves, state, seed=2)
    chains.burn_in(5)
    other = copied(chains)
    found = other.sample(5).positions
    assert chains.state.step == 5 and torch.equal(chains.sample(5).positions, found)
    for name, counts in chains.statistics.items():
        assert torch.equal(counts.acceptances, other.statistics[name].acceptances)


def test_nested_mixtures_multiply_probabilities() -> None:
    moves = Mixture([Mixture([Displacement(0.1), MALA(0.1)], [3.0, 1.0]), HMC(0.1, 2)], [1.0, 3.0])
    assert moves.probabilities == pytest.approx((0.1875, 0.0625, 0.75))


@pytest.mark.parametrize(
    "move",
    [Displacement(5.0), Displacement(0.001), MALA(1e-3), HMC(0.5, 4)],
    ids=["Displacement, too far", "Displacement, too near", "MALA", "HMC"],
)
def test_burn_in_reaches_the_target_acceptance(move: AbstractMove) -> None:
    law = wells()
    chains = Metropolis(law.target, move, law.sample(64, generator(1)), seed=5)
    chains.burn_in(400)
    scales = dict(chains.scales)
    assert float(move.scale) not in scales.values()
    chains.sample(100)
    (counts,) = chains.statistics.values()
    assert move.target_acceptance is not None
    assert float(counts.acceptance.mean()) == pytest.approx(move.target_acceptance, abs=0.04)
    assert dict(chains.scales) == scales


def test_scales_stay_finite_where_everything_is_accepted() -> None:
    flat = Target(lambda s: s.positions.new_zeros(s.n_chains), temperature=300.0)
    state = ChainState(positions=torch.zeros(8, 2, 3, dtype=F64))
    for move, largest in ((Displacement(0.1), 100.0), (Rotation(0.1, [[0, 1]]), math.pi)):
        chains = Metropolis(flat, move, state)
        chains.burn_in(300)
        assert chains.scales[move.name] == pytest.approx(largest)


def test_burn_in_without_adaptation_keeps_scales() -> None:
    law = wells()
    chains = Metropolis(law.target, Displacement(0.3), law.sample(4, generator(1)))
    chains.burn_in(50, adapt=False)
    assert chains.scales == {"Displacement": 0.3}


# Records ----------------------------------------------------------------------------------------


def test_records_replay_bit_by_bit() -> None:
    law = wells()
    moves = Sequence([Mixture([Displacement(0.1), MALA(0.05)]), HMC(0.03, 2)])
    chains = Metropolis(law.target, moves, law.sample(6, generator(1)), seed=3)
    samples = chains.sample(10, stride=2, record=Recording())
    assert len(samples.updates) == 10 * 2 * 2
    state = None
    for update in samples.updates:
        found = update.transition
        if state is not None:
            assert torch.equal(state.positions, found.before.positions)
        with torch.no_grad():
            again = transition(found.before, update.move, law.target, update.noise, update.u)
        assert torch.equal(again.after.positions, found.after.positions)
        assert torch.equal(again.log_alpha, found.log_alpha)
        assert torch.equal(found.accepted, update.u.log() < found.log_alpha)
        state = found.after
    assert state is not None
    assert torch.equal(state.positions, samples.states[-1].positions)
    assert not chains.sample(2).updates


def test_records_are_bounded() -> None:
    law = wells()
    chains = Metropolis(law.target, Displacement(0.1), law.sample(6, generator(1)))
    with pytest.raises(InvalidInputError, match=r"record: 100000 steps need about .* MiB"):
        chains.sample(100_000, record=Recording(max_bytes=1 << 20))


# No gradient through accepting ------------------------------------------------------------------


def test_gradients_through_a_chain_raise() -> None:
    system = HarmonicOscillators(2, center=0.1, k=500.0)
    state = ChainState.replicate(4, positions=torch.full((2, 3), 0.1, dtype=F64))
    chains = Metropolis(
        Target(system.potential, temperature=TEMPERATURE), Displacement(0.05), state
    )
    samples = chains.sample(5)
    for tensor in (samples.positions, samples.energies):
        with pytest.raises(UnsupportedDerivativeError, match=r"Covariance\(\)"):
            tensor.square().mean().backward()
    assert not samples.frames().positions.requires_grad
    assert torch.equal(
        samples.detach().positions, samples.frames().positions.reshape(4, 5, 2, 3).transpose(0, 1)
    )
    assert not samples.detach().energies.requires_grad
    with torch.no_grad():
        assert not samples.positions.requires_grad


def test_gradients_of_a_closure_raise() -> None:
    center = torch.tensor(0.1, dtype=F64, requires_grad=True)
    target = Target(lambda s: ((s.positions - center) ** 2).sum((-1, -2)), temperature=300.0)
    state = ChainState.replicate(4, positions=torch.zeros(2, 3, dtype=F64))
    samples = Metropolis(target, Displacement(0.5), state).sample(5)
    with pytest.raises(UnsupportedDerivativeError, match="accepting and rejecting"):
        torch.autograd.grad(samples.positions.mean(), center)


def test_gradients_by_function_transforms_raise() -> None:
    state = ChainState.replicate(4, positions=torch.zeros(2, 3, dtype=F64))

    def mean(center: torch.Tensor) -> torch.Tensor:
        target = Target(lambda s: ((s.positions - center) ** 2).sum((-1, -2)), temperature=300.0)
        return Metropolis(target, Displacement(0.5), state).sample(2).positions.mean()

    with pytest.raises(UnsupportedDerivativeError, match="accepting and rejecting"):
        torch.func.grad(mean)(torch.tensor(0.1, dtype=F64))


def test_what_requires_a_gradient_is_refused_at_once() -> None:
    law = wells()
    state = law.sample(2, generator(1))
    moving = state.replace(positions=state.positions.clone().requires_grad_())
    with pytest.raises(UnsupportedDerivativeError, match=r"positions: requires a gradient; .*Cov"):
        Metropolis(law.target, Displacement(0.1), moving)
    scale = torch.tensor(0.1, dtype=F64, requires_grad=True)
    with pytest.raises(UnsupportedDerivativeError, match=r"scale: that of Displacement.*tuning"):
        Metropolis(law.target, Displacement(scale), state)
    with pytest.raises(UnsupportedDerivativeError, match="log_activity: requires a gradient"):
        Target(law.target.energy, temperature=300.0, log_activity=scale)


# Into estimators --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move", [Displacement(0.1), MALA(0.1), HMC(0.05, 4)], ids=["Displacement", "MALA", "HMC"]
)
def test_samples_give_gradients_of_averages(move: AbstractMove) -> None:
    system = HarmonicOscillators(2, center=0.1, k=500.0)
    target = Target(system.potential, temperature=system.temperature)
    state = ChainState.replicate(8, positions=torch.full((2, 3), 0.1, dtype=F64))
    chains = Metropolis(target, move, state, seed=1)
    chains.burn_in(200)
    samples = chains.sample(600, stride=2)
    assert samples.ensemble == "NVT" and samples.bias == "exact"
    ensemble = samples.to_ensemble()
    assert torch.equal(ensemble.generating_energies, samples.energies.detach().T.reshape(-1))
    estimate = ensemble.estimate(lambda f: f.positions.square().mean(dim=(1, 2)))
    assert abs(float(estimate.value) - system.mean_square()) < 4 * float(estimate.standard_error)
    for name, exact in system.mean_square_gradient().items():
        error = float(estimate.gradient_standard_error[name])
        assert abs(float(estimate.gradient[name]) - exact) < 4 * error


def test_volume_moves_give_gradients_at_constant_pressure() -> None:
    system = IdealGas(3, pressure=40.0)
    frames = system.sample(16, generator=generator(1))
    target = Target(system.potential, temperature=system.temperature, pressure=40.0)
    state = ChainState(positions=frames.positions, box=frames.box)
    chains = Metropolis(target, Sequence([Displacement(0.5), Volume(0.5)]), state, seed=2)
    chains.burn_in(100)
    samples = chains.sample(500)
    assert samples.ensemble == "NPT"
    estimate = samples.to_ensemble().estimate(
        lambda f: torch.linalg.det(f.box) if f.box is not None else torch.zeros(0)
    )
    exact = system.volume_moment()
    assert abs(float(estimate.value) - exact) < 4 * float(estimate.standard_error)
    slope = system.mean_volume_gradient()["squeeze.tension"]
    error = float(estimate.gradient_standard_error["squeeze.tension"])
    assert abs(float(estimate.gradient["squeeze.tension"]) - slope) < 4 * error


def test_unadjusted_chains_have_their_own_law_and_say_so() -> None:
    k, scale = 500.0, 0.06
    system = HarmonicOscillators(2, center=0.1, k=k)
    target = Target(system.potential, temperature=system.temperature)
    state = ChainState.replicate(200, positions=torch.full((2, 3), 0.1, dtype=F64))
    chains = Metropolis(target, ULA(scale), state, seed=3)
    chains.burn_in(30)
    samples = chains.sample(50)
    assert samples.bias == "biased" and samples.ensemble is None
    assert chains.scales == {"ULA": scale}
    a = 0.5 * scale**2 * k / KT
    exact = scale**2 / (1 - (1 - a) ** 2)
    squares = (samples.positions.detach() - 0.1).square().mean(dim=(2, 3)).T.reshape(-1)
    error = float(standard_error(squares))
    assert abs(float(squares.mean()) - exact) < 4 * error
    assert abs(exact - system.variance) > 10 * error
    with pytest.raises(WrongEnsembleError, match="MALA instead of ULA"):
        samples.to_ensemble()


def test_shapes_of_samples() -> None:
    law = gas(n=3)
    moves = Mixture([Volume(0.1), Displacement(0.1)])
    samples = Metropolis(law.target, moves, law.sample(4, generator(1))).sample(6)
    assert samples.positions.shape == (6, 4, 3, 3) and len(samples) == 6 and samples.n_chains == 4
    assert samples.box is not None and samples.box.shape == (6, 4, 3, 3)
    assert samples.energies.shape == samples.numbers.shape == (6, 4)
    frames = samples.frames()
    assert torch.equal(frames.positions[6:12], samples.positions[:, 1])
    lattice = Metropolis(potts().target, SiteChange("spins", (0, 1, 2)), potts().states).sample(3)
    assert lattice.discrete["spins"].shape == (3, 27, 3)
    open_system = Metropolis(
        grand_canonical().target, InsertionDeletion(), grand_canonical().sample(3, generator(1))
    ).sample(5)
    assert open_system.present is not None and open_system.present.shape == (5, 3, 30)
    with pytest.raises(InvalidInputError, match="number of molecules varies"):
        open_system.frames()
    with pytest.raises(InvalidInputError, match="no Potential"):
        samples.to_ensemble()


def test_single_precision_positions() -> None:
    law = wells()
    state = law.sample(4, generator(1))
    single = state.replace(positions=state.positions.float())
    for move in (Displacement(0.1), MALA(0.05), HMC(0.02, 3), Translation(0.1, [[0, 1]])):
        chains = Metropolis(law.target, move, single)
        samples = chains.sample(5)
        assert samples.positions.dtype == torch.float32 and samples.energies.dtype == F64


# Refusals ---------------------------------------------------------------------------------------


def _state(**changes: Any) -> ChainState:
    return ChainState(**({"positions": torch.zeros(2, 3, 3, dtype=F64)} | changes))


BOX = torch.eye(3, dtype=F64).expand(2, 3, 3).clone()
FLAT = Target(lambda s: s.positions.new_zeros(s.n_chains), temperature=300.0)
OPEN = Target(lambda s: s.positions.new_zeros(s.n_chains), temperature=300.0, log_activity=0.0)

REFUSALS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Target(3, temperature=300.0), InvalidInputError, "energy: got int"),  # type: ignore[arg-type]
    (lambda: Target(FLAT.energy, temperature=-1.0), InvalidInputError, "temperature"),
    (
        lambda: Target(FLAT.energy, temperature=1.0, log_activity=float("nan")),
        InvalidInputError,
        "log_activity",
    ),
    (lambda: _state(positions=torch.zeros(3, 3)).checked(), InvalidInputError, r"chains, N, 3"),
    (lambda: _state(positions=torch.zeros(1, 3, 3).long()).checked(), InvalidInputError, "int64"),
    (lambda: _state(box=torch.eye(3)).checked(), InvalidInputError, "box: got shape"),
    (lambda: _state(discrete={"s": torch.zeros(2, 3)}).checked(), InvalidInputError, r"discrete"),
    (
        lambda: _state(discrete={"s": torch.zeros(3, 3).long()}).checked(),
        InvalidInputError,
        r"wanted \(2, ...\)",
    ),
    (lambda: _state(present=torch.zeros(2, 3)).checked(), InvalidInputError, "present: got"),
    (
        lambda: _state(positions=torch.full((1, 1, 3), torch.nan)).checked(),
        InvalidInputError,
        "NaN",
    ),
    (lambda: ChainState.replicate(0), InvalidInputError, "n_chains"),
    (lambda: Displacement(0.0), InvalidInputError, "scale"),
    (lambda: Displacement(torch.ones(3)), InvalidInputError, "scale"),
    (lambda: HMC(0.1, 0), InvalidInputError, "n_steps"),
    (lambda: HMC(0.1, 2, jitter=1.0), InvalidInputError, "jitter"),
    (lambda: HMC(0.1, 2, mass=-1.0), InvalidInputError, "mass"),
    (lambda: HMC(0.1, 2, mass=-torch.eye(3)), InvalidInputError, "positive definite"),
    (lambda: MALA(0.1, mass=[0.0]), InvalidInputError, "mass"),
    (lambda: SiteChange("s", (1, 1)), InvalidInputError, "values"),
    (lambda: IdentitySwap(), InvalidInputError, "species"),
    (lambda: Mixture([]), InvalidInputError, "probabilities"),
    (lambda: Mixture([Displacement(0.1)], [0.0]), InvalidInputError, "probabilities"),
    (lambda: Mixture([ULA(0.1)]), InvalidInputError, "cannot be in a mixture"),
    (lambda: Mixture([Sequence([Displacement(0.1)] * 2)]), InvalidInputError, "in a mixture"),
    (lambda: Sequence([]), InvalidInputError, "moves"),
    (lambda: Translation(0.1, [[]]), InvalidInputError, "none of them empty"),
    (lambda: Translation(0.1, [[1, 1]]), InvalidInputError, "twice"),
    (lambda: Torsion(0.1, [(0, 1)]), InvalidInputError, "none to turn about"),
    (lambda: Torsion(0.1, [(0, 0)]), InvalidInputError, "pairs of particles"),
    (
        lambda: Torsion(0.1, [(0, 1), (1, 2), (2, 0), (2, 3)], rotatable=[(0, 1)]),
        InvalidInputError,
        "in a ring",
    ),
    (
        lambda: Torsion(0.1, [(0, 1), (1, 2)], rotatable=[(0, 1)]),
        InvalidInputError,
        "nothing lies beyond",
    ),
    (
        lambda: Torsion(0.1, [(0, 1), (1, 2)], rotatable=[(0, 2)]),
        InvalidInputError,
        "not among the bonds",
    ),
    (lambda: InsertionDeletion(template=[1.0]), InvalidInputError, "template"),
    (
        lambda: Metropolis(FLAT, Displacement(0.1, particles=[3]), _state()),
        InvalidInputError,
        "indices below 3",
    ),
    (
        lambda: Metropolis(FLAT, Displacement(0.1, particles=[1, 1]), _state()),
        InvalidInputError,
        "twice",
    ),
    (
        lambda: Metropolis(FLAT, Translation(0.1, [[0, 1], [1, 2]]), _state()),
        InvalidInputError,
        "occurs in two",
    ),
    (
        lambda: Metropolis(FLAT, SiteChange("spins"), _state()),
        InvalidInputError,
        "no discrete variable 'spins'",
    ),
    (
        lambda: Metropolis(FLAT, SiteChange("s"), _state(discrete={"s": torch.full((2, 4), 7)})),
        InvalidInputError,
        "other than",
    ),
    (
        lambda: Metropolis(FLAT, IdentitySwap(species=[0, 1]), _state()),
        InvalidInputError,
        "species: got",
    ),
    (lambda: Metropolis(FLAT, MALA(0.1, mass=[1.0]), _state()), InvalidInputError, "mass"),
    (lambda: Metropolis(FLAT, MALA(0.1), _state()).step(), InvalidInputError, "no derivative"),
    (
        lambda: Metropolis(FLAT, HMC(0.1, 2, mass=torch.eye(3)), _state()),
        InvalidInputError,
        "mass: got shape",
    ),
    (
        lambda: Metropolis(FLAT, Displacement(0.1), potts().states),
        InvalidInputError,
        "particles",
    ),
    (lambda: Metropolis(FLAT, Volume(0.1), _state(box=BOX)), WrongEnsembleError, "no pressure"),
    (
        lambda: Metropolis(volume_target(), Displacement(0.1), _state(box=BOX)),
        WrongEnsembleError,
        "add a Volume move",
    ),
    (lambda: Metropolis(volume_target(), Volume(0.1), _state()), MissingBoxError, "box"),
    (
        lambda: Metropolis(volume_target(), Volume(0.1, molecules=[[0]]), _state(box=BOX)),
        InvalidInputError,
        "every particle must be in one",
    ),
    (
        lambda: Metropolis(OPEN, Displacement(0.1), _state()),
        InvalidInputError,
        "goes with state.present",
    ),
    (
        lambda: Metropolis(
            OPEN, Displacement(0.1), _state(box=BOX, present=torch.zeros(2, 3).bool())
        ),
        WrongEnsembleError,
        "add a InsertionDeletion move|InsertionDeletion",
    ),
    (
        lambda: Metropolis(OPEN, InsertionDeletion(), _state(present=torch.zeros(2, 3).bool())),
        MissingBoxError,
        "to insert into",
    ),
    (
        lambda: Metropolis(
            OPEN, InsertionDeletion(), _state(box=BOX, present=torch.zeros(2, 2).bool())
        ),
        InvalidInputError,
        "places",
    ),
    (
        lambda: Metropolis(
            OPEN,
            InsertionDeletion(molecules=[[0, 1, 2]], template=[[0, 0, 0], [0, 0, 1], [0, 0, 2.0]]),
            _state(box=BOX, present=torch.ones(2, 1).bool()),
        ),
        InvalidInputError,
        "another geometry",
    ),
    (
        lambda: Metropolis(
            OPEN, InsertionDeletion(), _state(box=BOX, present=torch.ones(2, 3).bool()), seed=1
        ).burn_in(9),
        SimulationError,
        "all 3 places are taken",
    ),
    (
        lambda: Metropolis(
            Target(lambda s: s.positions[..., 0].sum(-1) * torch.nan, temperature=1.0),
            Displacement(0.1),
            _state(),
        ),
        InvalidInputError,
        "energy of chain 0 at the start",
    ),
    (
        lambda: Metropolis(
            Target(lambda s: s.positions, temperature=1.0), Displacement(0.1), _state()
        ),
        InvalidInputError,
        "energy: returned shape",
    ),
    (
        lambda: Metropolis(
            Target(
                lambda s: torch.where(s.positions.abs().sum((-1, -2)) > 0, torch.nan, 0.0),
                temperature=1.0,
            ),
            Displacement(0.1),
            _state(),
        ).step(),
        SimulationError,
        "of a proposal of chain 0 is nan",
    ),
    (
        lambda: Metropolis(FLAT, Displacement(0.1), _state()).sample(0),
        InvalidInputError,
        "n_samples",
    ),
    (
        lambda: Metropolis(
            FLAT,
            Torsion(0.1, [(0, 1), (1, 2), (2, 3)]),
            ChainState(
                positions=torch.tensor([[[0.0] * 3, [0.1, 0, 0], [0.9, 0, 0], [0.9, 0.1, 0]]]),
                box=torch.eye(3)[None],
            ),
        ),
        InvalidInputError,
        r"bond \(1, 2\) spans more than half",
    ),
]


@pytest.mark.parametrize(("action", "error", "match"), REFUSALS)
def test_refusals(action: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        action()
