"""Networks in averages: gradients by their weights against differences of reweighted averages."""

import pytest
import torch
from mdgraft import Frames
from mdgraft.ensembles import Ensemble
from mdgraft.neural import MessagePassingNetwork, neural_potential
from mdgraft.testing import finite_difference

NUMBERS = [8, 1, 1, 6]


def potential_of(n_particles=4, **options):
    network = MessagePassingNetwork([1, 6, 8], 0.5, channels=4, radial=4, **options)
    with torch.no_grad():
        # Energies of a few kT, so that weights matter.
        network.scale.fill_(8.0)
    return neural_potential(network, NUMBERS)


def frames(n, seed=0):
    """Independent draws from a Gaussian, whose energies are known, around four sites."""
    random = torch.Generator().manual_seed(seed)
    sites = torch.tensor([[0.0, 0, 0], [0.12, 0, 0], [0, 0.13, 0], [0.1, 0.1, 0.15]]).double()
    x = sites + 0.03 * torch.randn(n, 4, 3, generator=random, dtype=torch.float64)
    return Frames(positions=x)


def distance(batch):
    return (batch.positions[:, 1] - batch.positions[:, 0]).norm(dim=-1)


@pytest.mark.parametrize("name", ["neural.model.scale", "neural.model.rounds.0.filter.weight"])
def test_gradient_of_an_average(name):
    potential = potential_of()
    ensemble = Ensemble(potential, frames(40), temperature=300.0)
    parameter = potential.get_parameter(name)
    direction = torch.randn(
        parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    ensemble.average(distance).backward()
    slope = (parameter.grad * direction).sum().item()
    start = parameter.detach().clone()

    def reweighted(t):
        with torch.no_grad():
            parameter.copy_(start + t * direction)
            value = ensemble.average(distance).item()
            parameter.copy_(start)
        return value

    truth = finite_difference(reweighted, step=1e-2)
    assert abs(slope) > 1e-7
    assert slope == pytest.approx(float(truth.value), rel=1e-6, abs=10 * float(truth.error))


def test_estimate_agrees_with_the_graph():
    potential = potential_of()
    potential.freeze("*").unfreeze("*.readout.*", "*.scale")
    ensemble = Ensemble(potential, frames(40), temperature=300.0)
    estimate = ensemble.estimate(distance)
    ensemble.average(distance).backward()
    for name, parameter in potential.named_parameters():
        if parameter.requires_grad:
            found = torch.as_tensor(estimate.gradient[name])
            torch.testing.assert_close(found, parameter.grad, rtol=1e-8, atol=1e-12)


def test_observables_of_the_network_itself():
    """The mean energy: its gradient has a direct part beside the change of weights."""
    potential = potential_of()
    ensemble = Ensemble(potential, frames(30), temperature=300.0)
    mean = ensemble.average(lambda batch: potential(batch.positions))
    mean.backward()
    scale = potential.get_parameter("neural.model.scale")
    with torch.no_grad():
        energies = potential(ensemble.frames.positions)
        shift = float(potential.get_parameter("neural.model.shift").abs().max())
    assert shift == 0.0
    weights = ensemble.weights().detach()
    beta, average = ensemble.beta, (weights * energies).sum()
    # d<U>/ds = <U>/s - beta (<U^2> - <U>^2)/s, as U = s u.
    variance = (weights * energies**2).sum() - average**2
    expected = (average - beta * variance) / scale.detach()
    torch.testing.assert_close(scale.grad, expected)


def test_force_matching_learns():
    """Adam on energies and forces of a teacher brings a student close, second order included."""
    teacher = potential_of(seed=5)
    student = potential_of(seed=6)
    x = frames(8).positions
    with torch.no_grad():
        energies, forces = teacher(x), teacher.forces(x)
    optimiser = torch.optim.Adam(student.parameters(), lr=2e-2)

    def loss():
        difference = student(x) - energies
        return (student.forces(x) - forces).pow(2).mean() + difference.pow(2).mean()

    first = loss().item()
    for _ in range(40):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
    assert value.item() < 0.2 * first
