"""Every move keeps exact laws, in detailed balance, and undoes itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from mdgraft.montecarlo import (
    HMC,
    MALA,
    AbstractMove,
    ChainState,
    Displacement,
    IdentitySwap,
    InsertionDeletion,
    Metropolis,
    Mixture,
    Rotation,
    Sequence,
    SiteChange,
    Target,
    Torsion,
    Translation,
    Volume,
    transition,
)
from montecarlo_laws import (
    F64,
    TEMPERATURE,
    Enumerated,
    Law,
    alloy,
    dipole,
    gas,
    generator,
    grand_canonical,
    occupied,
    potts,
    torsion,
    wells,
)

CHAINS = 6_000
CHAIN_BONDS = ((0, 1), (1, 2), (2, 3))


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    law: Callable[[], Law]
    move: Callable[[], AbstractMove]
    steps: int = 6


MATRIX = torch.tensor(
    [[2.0, 0.5, 0, 0, 0, 0.3], [0.5, 1.0, 0, 0, 0, 0], [0, 0, 3.0, 0, 0, 0],
     [0, 0, 0, 1.0, 0.2, 0], [0, 0, 0, 0.2, 1.5, 0], [0.3, 0, 0, 0, 0, 1.0]],
    dtype=F64,
)  # fmt: skip

CONTINUOUS = [
    Case("one particle", wells, lambda: Displacement(0.1), 12),
    Case("all particles", wells, lambda: Displacement(0.06, together=True)),
    Case("MALA", wells, lambda: MALA(0.08)),
    Case("MALA with masses", wells, lambda: MALA(0.08, mass=[1.0, 4.0])),
    Case("HMC", wells, lambda: HMC(0.03, 4)),
    Case("HMC with masses", wells, lambda: HMC(0.05, 4, mass=[1.0, 5.0], jitter=0.3)),
    Case("HMC with a mass matrix", wells, lambda: HMC(0.05, 3, mass=MATRIX)),
    Case("translation", wells, lambda: Translation(0.1, [[0], [1]]), 12),
    Case("rotation", dipole, lambda: Rotation(1.0, [[0, 1]])),
    Case("torsion", torsion, lambda: Torsion(1.5, CHAIN_BONDS)),
    Case("volume", gas, lambda: Volume(0.5)),
    Case(
        "volume of molecules",
        lambda: gas(atoms=3),
        lambda: Volume(0.5, molecules=[range(3 * i, 3 * i + 3) for i in range(4)]),
    ),
    Case("insertion and deletion", grand_canonical, lambda: InsertionDeletion(), 6),
    Case(
        "insertion where there is little room",
        lambda: grand_canonical(truncated=5),
        lambda: InsertionDeletion(truncate=True),
        6,
    ),
    Case(
        "insertion and translation",
        grand_canonical,
        lambda: Mixture([InsertionDeletion(), Translation(0.4, [[i] for i in range(30)])]),
        6,
    ),
    Case(
        "mixture",
        wells,
        lambda: Mixture([Displacement(0.1), MALA(0.08), HMC(0.03, 3)], [1.0, 2.0, 1.0]),
    ),
    Case("sequence", wells, lambda: Sequence([Displacement(0.1), MALA(0.08), Displacement(0.1)])),
]


@pytest.mark.parametrize("case", CONTINUOUS, ids=lambda c: c.name)
def test_exact_samples_stay_exact(case: Case) -> None:
    law = case.law()
    start = law.sample(CHAINS, generator(5))
    chains = Metropolis(law.target, case.move(), start, seed=11)
    for _ in range(case.steps):
        chains.step()
    for counts in chains.statistics.values():
        accepted = float(counts.acceptances.sum() / counts.attempts.sum())
        assert 0.05 < accepted <= 1.0
    for name, (quantity, exact) in law.means.items():
        for which, state in (("start", start), ("end", chains.state)):
            values = quantity(state)
            error = float(values.std()) / math.sqrt(CHAINS)
            assert abs(float(values.mean()) - exact) < 4.0 * error + 1e-9, (name, which)


@pytest.mark.parametrize("case", CONTINUOUS, ids=lambda c: c.name)
def test_flux_is_as_large_there_as_back(case: Case) -> None:
    # In equilibrium f(before) g(after) and g(before) f(after) have the same mean.
    law = case.law()
    start = law.sample(CHAINS, generator(6))
    chains = Metropolis(law.target, case.move(), start, seed=12)
    if len(chains.moves.updates) > 1:
        return  # Each update has detailed balance, their sequence has none.
    before = chains.state
    chains.step()
    after = chains.state
    quantities = [quantity for quantity, _ in law.means.values()]
    for f in quantities:
        for g in quantities:
            there, back = f(before) * g(after).square(), f(after) * g(before).square()
            difference = there - back
            error = float(difference.std()) / math.sqrt(CHAINS)
            assert abs(float(difference.mean())) < 4.5 * error + 1e-9


DISCRETE: list[tuple[str, Callable[[], Enumerated], Callable[[], AbstractMove]]] = [
    ("change of a site", potts, lambda: SiteChange("spins", (0, 1, 2))),
    ("exchange of values", lambda: alloy(True), lambda: IdentitySwap(variable="species")),
    ("exchange of positions", lambda: alloy(False), lambda: IdentitySwap(species=[0, 0, 1, 1, 2])),
    ("occupancy", occupied, lambda: SiteChange("present")),
    (
        "mixture",
        potts,
        lambda: Mixture([SiteChange("spins", (0, 1, 2)), IdentitySwap(variable="spins")], [1, 3]),
    ),
]


def labelled(system: Enumerated) -> tuple[torch.Tensor, int]:
    """Exact probability of each label."""
    labels = system.label(system.states)
    n = int(labels.max()) + 1
    return torch.zeros(n, dtype=F64).index_add(0, labels, system.probabilities), n


@pytest.mark.parametrize(
    ("system", "move"), [(s, m) for _, s, m in DISCRETE], ids=[name for name, _, _ in DISCRETE]
)
def test_enumerated_laws_and_detailed_balance(
    system: Callable[[], Enumerated], move: Callable[[], AbstractMove]
) -> None:
    exact = system()
    probabilities, n = labelled(exact)
    n_chains = 20_000
    start = exact.sample(n_chains, generator(7))
    chains = Metropolis(exact.target, move(), start, seed=13)
    before = exact.label(chains.state)
    chains.step()
    after = exact.label(chains.state)
    flux = torch.zeros(n * n, dtype=F64)
    flux.index_add_(0, before * n + after, torch.ones(n_chains, dtype=F64))
    flux = flux.reshape(n, n)
    assert float(flux.diag().sum()) < 0.95 * n_chains
    # Counts of each pair there and back are binomial with even odds.
    off = torch.triu_indices(n, n, 1)
    there, back = flux[off[0], off[1]], flux[off[1], off[0]]
    used = there + back > 0
    chi2 = ((there - back).square() / (there + back).clamp(min=1.0))[used].sum()
    freedom = int(used.sum())
    assert abs(float(chi2) - freedom) < 4.5 * math.sqrt(2.0 * freedom)
    for _ in range(8):
        chains.step()
    counts = torch.bincount(exact.label(chains.state), minlength=n).double()
    expected = n_chains * probabilities
    chi2 = ((counts - expected).square() / expected).sum()
    assert abs(float(chi2) - (n - 1)) < 4.5 * math.sqrt(2.0 * (n - 1))


@pytest.mark.parametrize(
    ("system", "move"), [(s, m) for _, s, m in DISCRETE], ids=[name for name, _, _ in DISCRETE]
)
def test_wrong_starts_are_forgotten(
    system: Callable[[], Enumerated], move: Callable[[], AbstractMove]
) -> None:
    exact = system()
    probabilities, n = labelled(exact)
    n_chains = 2_000
    chains = Metropolis(exact.target, move(), exact.states[[0] * n_chains], seed=14)
    for _ in range(200):
        chains.step()
    counts = torch.bincount(exact.label(chains.state), minlength=n).double()
    expected = n_chains * probabilities
    chi2 = ((counts - expected).square() / expected).sum()
    assert abs(float(chi2) - (n - 1)) < 4.5 * math.sqrt(2.0 * (n - 1))


# Inverses ---------------------------------------------------------------------------------------

INVERSES: list[tuple[str, Callable[[], Law], Callable[[], AbstractMove], tuple[str, ...]]] = [
    ("displacement", wells, lambda: Displacement(0.1), ("normal",)),
    ("all particles", wells, lambda: Displacement(0.1, together=True), ("normal",)),
    ("translation", wells, lambda: Translation(0.1, [[0, 1]]), ("normal",)),
    ("rotation", dipole, lambda: Rotation(1.0, [[0, 1]]), ("angle",)),
    ("torsion", torsion, lambda: Torsion(1.0, CHAIN_BONDS), ("normal",)),
    ("volume", lambda: gas(atoms=2, n=3), lambda: Volume(0.3), ("normal",)),
    (
        "volume of molecules",
        lambda: gas(atoms=2, n=3),
        lambda: Volume(0.3, molecules=[[0, 1], [3, 2], [4, 5]]),
        ("normal",),
    ),
]


@pytest.mark.parametrize(
    ("law", "move", "odd"), [c[1:] for c in INVERSES], ids=[c[0] for c in INVERSES]
)
def test_opposite_noise_undoes_a_move(
    law: Callable[[], Law], move: Callable[[], AbstractMove], odd: tuple[str, ...]
) -> None:
    exact, mover = law(), move()
    state = exact.sample(7, generator(8))
    noise = mover.draw(state, generator(9))
    there = mover.apply(state, noise, exact.target)
    reverse = {k: -v if k in odd else v for k, v in noise.items()}
    back = mover.apply(there.state, reverse, exact.target)
    assert not torch.allclose(there.state.positions, state.positions)
    torch.testing.assert_close(back.state.positions, state.positions, rtol=0, atol=1e-13)
    if state.box is not None:
        torch.testing.assert_close(back.state.box, state.box)
    torch.testing.assert_close(back.log_ratio, -there.log_ratio)


@pytest.mark.parametrize(
    ("law", "move", "odd"), [c[1:] for c in INVERSES], ids=[c[0] for c in INVERSES]
)
def test_ratio_is_the_jacobian(
    law: Callable[[], Law], move: Callable[[], AbstractMove], odd: tuple[str, ...]
) -> None:
    # Of the map of positions at given noise; a volume move maps ln V as well, one factor V'/V.
    exact, mover = law(), move()
    state = exact.sample(1, generator(8))
    noise = mover.draw(state, generator(9))

    def moved(x: torch.Tensor) -> torch.Tensor:
        proposal = mover.apply(state.replace(positions=x.reshape(1, -1, 3)), noise, exact.target)
        return proposal.state.positions.reshape(-1)

    jacobian = torch.autograd.functional.jacobian(moved, state.positions.reshape(-1))
    log_det = float(torch.linalg.slogdet(jacobian)[1])
    proposal = mover.apply(state, noise, exact.target)
    if state.box is not None and proposal.state.box is not None:
        log_det += float((torch.linalg.det(proposal.state.box) / torch.linalg.det(state.box)).log())
    assert float(proposal.log_ratio) == pytest.approx(log_det, abs=1e-12)


@pytest.mark.parametrize("move", [HMC(0.02, 7), HMC(0.05, 2, mass=MATRIX)], ids=["mass", "matrix"])
def test_trajectories_are_reversible_and_preserve_volume(move: HMC) -> None:
    # Pair of quartic wells, so that the flow is not linear.
    target = Target(
        lambda s: (s.positions.pow(4) * 3e3 + s.positions[:, :1] * 20.0).sum(dim=(-2, -1)),
        temperature=TEMPERATURE,
    )
    x = 0.1 * torch.randn(1, 2, 3, generator=generator(3), dtype=F64)
    v = torch.randn(1, 2, 3, generator=generator(4), dtype=F64)
    step = move.scale.reshape(1)

    def flow(z: torch.Tensor) -> torch.Tensor:
        state = ChainState(positions=z[:6].reshape(1, 2, 3))
        energies, forces = target.energies_and_forces(state)
        start = state.replace(energies=energies, forces=forces)
        ended, v_end, alive = move.trajectory(start, z[6:].reshape(1, 2, 3), step, target)
        assert bool(alive.all())
        return torch.cat((ended.positions.reshape(-1), v_end.reshape(-1)))

    z = torch.cat((x.reshape(-1), v.reshape(-1)))
    end = flow(z)
    turned = end * torch.tensor([1.0] * 6 + [-1.0] * 6, dtype=F64)
    back = flow(turned) * torch.tensor([1.0] * 6 + [-1.0] * 6, dtype=F64)
    assert not torch.allclose(end, z, atol=1e-3)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(flow, z)
    assert not torch.allclose(jacobian, torch.eye(12, dtype=F64), atol=1e-2)
    assert abs(float(torch.linalg.slogdet(jacobian)[1])) < 1e-10


# Particular moves -------------------------------------------------------------------------------


def test_torsions_keep_bonds_and_angles_and_find_rotatable_bonds() -> None:
    # A ring of three (4, 5, 6) on a branched chain.
    bonds = [(0, 1), (1, 2), (2, 3), (2, 7), (3, 4), (4, 5), (5, 6), (6, 4)]
    move = Torsion(1.0, bonds)
    assert move.axes.tolist() == [[1, 2], [2, 3], [3, 4]]
    x = torch.randn(64, 8, 3, generator=generator(1), dtype=F64)
    state = ChainState(positions=x)
    target = Target(lambda s: s.positions[..., 0].sum(-1), temperature=TEMPERATURE)
    new = move.propose(state, target, generator(2)).state.positions
    for i, j in [*bonds, (0, 2), (1, 3), (1, 7), (3, 7), (2, 4), (3, 5), (3, 6)]:
        torch.testing.assert_close(
            (new[:, i] - new[:, j]).norm(dim=-1), (x[:, i] - x[:, j]).norm(dim=-1)
        )
    assert not torch.allclose(new, x)
    # The smaller side moves: of the bond (3, 4) the ring.
    assert torch.equal(new[:, 2], x[:, 2])


def test_torsions_take_boxes_of_another_precision() -> None:
    state = ChainState(
        positions=torch.randn(2, 4, 3, generator=generator(1), dtype=F64),
        box=10.0 * torch.eye(3).expand(2, 3, 3),
    )
    target = Target(lambda s: s.positions.square().sum(dim=(1, 2)), temperature=TEMPERATURE)
    Metropolis(target, Torsion(0.5, [(0, 1), (1, 2), (2, 3)]), state).step()


def test_molecules_of_several_species_come_and_go() -> None:
    # Species a: single particles, b: rigid pairs; both ideal, with activities of their own.
    n_a, n_b = 12, 12
    molecules = [[n_a + 2 * i, n_a + 2 * i + 1] for i in range(n_b)]
    template = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.0, 0.0]], dtype=F64)
    moves = Mixture(
        [
            InsertionDeletion(molecules=[[i] for i in range(n_a)], places=range(n_a), name="a"),
            InsertionDeletion(
                molecules=molecules, template=template, places=range(n_a, n_a + n_b), name="b"
            ),
        ]
    )
    log_z = torch.tensor([math.log(1.0)] * n_a + [math.log(2.0)] * n_b, dtype=F64)
    target = Target(
        lambda s: s.positions.new_zeros(s.n_chains), temperature=TEMPERATURE, log_activity=log_z
    )
    n_chains = 2000
    state = ChainState(
        positions=torch.zeros(n_chains, n_a + 2 * n_b, 3, dtype=F64),
        box=torch.eye(3, dtype=F64).expand(n_chains, 3, 3).clone(),
        present=torch.zeros(n_chains, n_a + n_b, dtype=torch.bool),
    )
    chains = Metropolis(target, moves, state, seed=2)
    chains.burn_in(50)
    present = chains.state.present
    assert present is not None
    for places, z in ((slice(0, n_a), 1.0), (slice(n_a, None), 2.0)):
        n = present[:, places].sum(dim=1).double()
        assert abs(float(n.mean()) - z) < 4 * math.sqrt(z / n_chains)
        assert float(n.var()) == pytest.approx(z, rel=4 * math.sqrt(3.0 / n_chains))
    x = chains.state.positions[:, n_a:].reshape(n_chains, n_b, 2, 3)
    arms = (x[:, :, 1] - x[:, :, 0])[present[:, n_a:]]
    torch.testing.assert_close(arms.norm(dim=-1), torch.full((len(arms),), 0.3, dtype=F64))
    error = 0.3 / math.sqrt(3 * len(arms))
    assert bool((arms.mean(dim=0).abs() < 4 * error).all())
    second = arms.T @ arms / len(arms)
    assert bool(((second - 0.03 * torch.eye(3)).abs() < 5 * 0.09 / math.sqrt(len(arms))).all())


def test_exchange_of_molecules_exchanges_centres() -> None:
    molecules = [[0, 1], [2], [3, 4, 5]]
    move = IdentitySwap(species=[0, 1, 2], molecules=molecules)
    x = torch.randn(50, 6, 3, generator=generator(4), dtype=F64)
    target = Target(lambda s: s.positions[..., 0].sum(-1), temperature=TEMPERATURE)
    new = move.propose(ChainState(positions=x), target, generator(5)).state.positions
    old_centres = torch.stack([x[:, m].mean(dim=1) for m in molecules], dim=1)
    centres = torch.stack([new[:, m].mean(dim=1) for m in molecules], dim=1)
    torch.testing.assert_close(centres.sum(dim=1), old_centres.sum(dim=1))
    torch.testing.assert_close(new[:, 1] - new[:, 0], x[:, 1] - x[:, 0])
    same = (centres - old_centres).norm(dim=-1) < 1e-12
    assert bool((same.sum(dim=1) == 1).all())


def test_forces_of_the_state_are_used_and_right() -> None:
    law = wells()
    calls = 0
    energy = law.target.energy

    def counted(state: ChainState) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return energy(state)  # type: ignore[operator,no-any-return]

    target = Target(counted, temperature=TEMPERATURE)
    chains = Metropolis(target, MALA(0.05), law.sample(4, generator(1)))
    chains.step()
    calls = 0
    for _ in range(10):
        chains.step()
    assert calls == 10
    fresh = target.energies_and_forces(chains.state.replace(forces=None, energies=None))
    assert chains.state.energies is not None and chains.state.forces is not None
    torch.testing.assert_close(chains.state.energies, fresh[0])
    torch.testing.assert_close(chains.state.forces, fresh[1])


def test_a_mixture_evaluates_each_proposal_once() -> None:
    law = wells()
    evaluated = 0
    energy = law.target.energy

    def counted(state: ChainState) -> torch.Tensor:
        nonlocal evaluated
        evaluated += state.n_chains
        return energy(state)  # type: ignore[operator,no-any-return]

    target = Target(counted, temperature=TEMPERATURE)
    moves = Mixture([Displacement(0.05), Displacement(0.1, together=True)])
    chains = Metropolis(target, moves, law.sample(50, generator(1)))
    evaluated = 0
    chains.step()
    assert evaluated == 50


def test_impossible_proposals_are_rejections_without_evaluation() -> None:
    system = potts()
    alike = system.states[[0, 0]]
    called = []

    def energy(state: ChainState) -> torch.Tensor:
        called.append(state.n_chains)
        return state.positions.new_zeros(state.n_chains)

    chains = Metropolis(Target(energy, temperature=1.0), IdentitySwap(variable="spins"), alike)
    called.clear()
    (update,) = chains.step()
    assert not called and not bool(update.transition.accepted.any())
    assert bool((update.transition.log_alpha == -torch.inf).all())


def test_hard_walls_reject() -> None:
    wall = Target(
        lambda s: torch.where(s.positions.abs().amax(dim=(-2, -1)) < 0.5, 0.0, torch.inf).double(),
        temperature=TEMPERATURE,
    )
    state = ChainState(positions=torch.zeros(2000, 1, 3, dtype=F64))
    chains = Metropolis(wall, Displacement(0.5), state)
    chains.burn_in(60, adapt=False)
    x = chains.state.positions
    assert float(x.abs().max()) < 0.5
    assert float(x.var()) == pytest.approx(1 / 12, rel=4 * math.sqrt(0.8 / 6000))


def test_trajectories_that_blow_up_are_rejections() -> None:
    def quartic(state: ChainState) -> torch.Tensor:
        return 1e3 * state.positions.pow(4).sum(dim=(-2, -1))

    state = ChainState(positions=torch.full((3, 1, 3), 0.1, dtype=F64))
    chains = Metropolis(Target(quartic, temperature=TEMPERATURE), HMC(0.9, 40, jitter=0.0), state)
    for _ in range(3):
        (update,) = chains.step()
        assert bool(torch.isfinite(update.transition.after.positions).all())
    assert float(update.transition.log_alpha.max()) < 0
    assert int(chains.statistics["HMC"].acceptances.sum()) == 0


def test_transition_is_a_function_of_its_noise() -> None:
    law = wells()
    state = law.sample(5, generator(1))
    for move in (Displacement(0.1), MALA(0.05), HMC(0.02, 3)):
        noise = move.draw(state, generator(2))
        u = torch.rand(5, generator=generator(3), dtype=F64)
        first, second = (transition(state, move, law.target, noise, u) for _ in range(2))
        assert torch.equal(first.after.positions, second.after.positions)
        assert torch.equal(first.log_alpha, second.log_alpha)


def test_log_alpha_has_a_graph_for_estimators() -> None:
    law = wells()
    state = law.sample(3, generator(1))
    center = torch.tensor(0.1, dtype=F64, requires_grad=True)
    target = Target(
        lambda s: 0.5 * 400.0 * ((s.positions - center) ** 2).sum(dim=(-2, -1)),
        temperature=TEMPERATURE,
    )
    for move in (Displacement(0.05), MALA(0.05), HMC(0.02, 3)):
        noise, u = move.draw(state, generator(2)), torch.full((3,), 0.5, dtype=F64)

        def log_alpha(value: float, move: AbstractMove = move, noise: object = noise) -> float:
            with torch.no_grad():
                center.fill_(value)
                return float(transition(state, move, target, noise, u).log_alpha.sum())  # type: ignore[arg-type]  # noqa: B023

        numeric = (log_alpha(0.1 + 1e-6) - log_alpha(0.1 - 1e-6)) / 2e-6
        with torch.no_grad():
            center.fill_(0.1)
        (exact,) = torch.autograd.grad(
            transition(state, move, target, noise, u).log_alpha.sum(), center
        )
        assert float(exact) == pytest.approx(numeric, rel=1e-6, abs=1e-6)
