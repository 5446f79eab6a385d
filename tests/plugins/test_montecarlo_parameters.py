"""Chains whose energy changes between steps: nothing is decided by an energy of the past."""

from __future__ import annotations

import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft._units import BOLTZMANN
from mdgraft.montecarlo import MALA, ULA, ChainState, Displacement, Metropolis, Target
from mdgraft.montecarlo.gradients import Score
from torch import Tensor, nn

F64 = torch.float64


class Well(nn.Module):
    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=F64))

    def forward(self, state: ChainState) -> Tensor:
        return 0.5 * self.k * state.positions.square().sum(dim=(1, 2))


def chains(energy: Well, n_chains: int = 20, **box: Tensor) -> Metropolis:
    start = ChainState.replicate(n_chains, positions=torch.full((1, 3), 0.1, dtype=F64), **box)
    target = Target(energy, temperature=300.0)
    return Metropolis(target, Displacement(0.1, together=True), start, seed=4)


@pytest.mark.parametrize("trainable", [True, False])
def test_parameters_may_change_between_steps(trainable: bool) -> None:
    energy = Well(50.0)
    energy.k.requires_grad_(trainable)
    sampler = chains(energy)
    sampler.burn_in(20, adapt=False)
    with torch.no_grad():
        energy.k.mul_(40.0)
        assert torch.equal(sampler.state.energies, energy(sampler.state))
        energy.k.mul_(2.0)
        (update,) = sampler.step()
        assert torch.equal(update.transition.before.energies, energy(update.transition.before))
        energy.k.data = torch.tensor(300.0, dtype=F64)
        sampler.forget_energies()
        assert torch.equal(sampler.state.energies, energy(sampler.state))


def test_forces_change_with_parameters() -> None:
    energy = Well(50.0)
    start = ChainState.replicate(4, positions=torch.full((1, 3), 0.1, dtype=F64))
    sampler = Metropolis(Target(energy, temperature=300.0), MALA(0.02), start)
    sampler.burn_in(5)
    with torch.no_grad():
        energy.k.fill_(200.0)
    (update,) = sampler.step()
    before = update.transition.before
    torch.testing.assert_close(before.forces, -200.0 * before.positions)


def test_a_chain_that_goes_on_has_the_law_of_the_new_parameters() -> None:
    energy = Well(2000.0)
    sampler = chains(energy, n_chains=2000)
    sampler.burn_in(60, adapt=False)
    with torch.no_grad():
        energy.k.fill_(400.0)
    sampler.burn_in(60, adapt=False)
    found = sampler.state.energies.detach()
    # The energy of three harmonic coordinates, Gamma distributed.
    kt = BOLTZMANN * 300.0
    assert abs(float(found.mean()) / (1.5 * kt) - 1.0) < 4.0 * (1.5 * 2000) ** -0.5


def test_stored_chains_take_the_energies_of_their_new_target() -> None:
    old, new = chains(Well(50.0)), chains(Well(90.0))
    old.burn_in(10)
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.state.positions, old.state.positions)
    with torch.no_grad():
        assert torch.equal(new.state.energies, new.target.energies(new.state))


def test_stored_chains_must_have_the_same_variables() -> None:
    boxed = chains(Well(50.0), box=torch.eye(3, dtype=F64))
    with pytest.raises(InvalidInputError, match=r"values: hold .* wanted .*'box': \(20, 3, 3\)"):
        boxed.load_state_dict(chains(Well(50.0)).state_dict())


def test_scores_of_chains_without_a_test_are_called_biased() -> None:
    start = ChainState.replicate(4, positions=torch.zeros(1, 3, dtype=F64))
    sampler = Metropolis(Target(Well(50.0), temperature=300.0), ULA(0.02), start)
    estimate = Score(window=None).estimate(sampler, lambda s: s.positions[:, 0, 0], 4)
    assert estimate.bias == "biased"
