"""The metric of constraints: Fixman's potential, and derivatives in constrained lengths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from mdgraft import (
    ConstraintError,
    Frames,
    InvalidInputError,
    Potential,
    UnsupportedDerivativeError,
    WrongEnsembleError,
)
from mdgraft._units import BOLTZMANN
from mdgraft.constraints import (
    AverageSite,
    ConstraintSet,
    Fixman,
    VirtualSites,
    fixman_potential,
    length_response,
    log_metric_determinant,
    metric_response,
)
from mdgraft.ensembles import Ensemble, length_derivative, length_mean_force
from mdgraft.ensembles.observables import Volume
from mdgraft.potentials import AbstractTerm
from mdgraft.testing import check_potential

# Cases: pairs, particles. -----------------------------------------------------------------------

CASES = {
    "bond": ([(0, 1)], 2),
    "angle": ([(0, 1), (1, 2)], 3),
    "triangle": ([(0, 1), (1, 2), (2, 0)], 3),
    "methyl": ([(0, 1), (0, 2), (0, 3)], 5),
    "tetrahedron": (list(itertools.combinations(range(4), 2)), 4),
    "ring and bond": ([*((k, (k + 1) % 6) for k in range(6)), (6, 7)], 8),
    "chain that is filled up": ([(k, k + 1) for k in range(17)], 18),
    "large ring": ([(k, (k + 1) % 66) for k in range(66)], 66),
}
each_case = pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "_"))


def normal(*shape, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def build(name, n_frames=2):
    pairs, n = CASES[name]
    x = torch.cumsum(0.2 * normal(n_frames, n, 3), dim=1)
    masses = 1 + 10 * normal(n, seed=2).abs()
    return ConstraintSet(pairs, [0.1] * len(pairs), masses), x


def distances(c, x):
    return (x[c.pairs[:, 1]] - x[c.pairs[:, 0]]).norm(dim=-1)


def metric(c, x):
    """Z of one frame by definition."""
    rows = torch.func.jacrev(lambda y: distances(c, y))(x).flatten(1)
    inverse = (1 / c.masses).repeat_interleave(3)
    return (rows * inverse) @ rows.T


def displacement(c, x):
    """``w_b = M^-1 grad(c)^T Z^-1 e_b`` of one frame by definition, ``(C, 3N)``."""
    rows = torch.func.jacrev(lambda y: distances(c, y))(x).flatten(1)
    inverse = (1 / c.masses).repeat_interleave(3)
    return torch.linalg.solve(metric(c, x), rows * inverse)


@each_case
def test_log_determinant(name):
    c, x = build(name)
    wanted = torch.stack([torch.linalg.slogdet(metric(c, frame)).logabsdet for frame in x])
    torch.testing.assert_close(log_metric_determinant(c, x), wanted, atol=1e-10, rtol=1e-12)
    masses = c.masses.detach().clone().requires_grad_()
    found = torch.autograd.grad(log_metric_determinant(c, x[0], masses=masses), masses)[0]
    # Homogeneous of degree -C in the masses.
    assert float((found * masses.detach()).sum()) == pytest.approx(-c.n_constraints, rel=1e-10)


@each_case
def test_response_along_displacements(name):
    c, x = build(name)
    gradients = normal(2, 3, c.n_particles, 3, seed=4)
    found = length_response(c, x, gradients)
    for f in range(2):
        wanted = gradients[f].flatten(1) @ displacement(c, x[f]).T
        torch.testing.assert_close(found[f], wanted, atol=1e-9, rtol=1e-9)
    # Each displacement changes its own distance at unit rate and no other.
    rates = torch.func.jacrev(lambda y: distances(c, y))(x[0])
    own = length_response(c, x[:1], rates[None])[0]
    torch.testing.assert_close(own, torch.eye(c.n_constraints, dtype=torch.float64))


@each_case
def test_metric_response_is_divergence_and_determinant(name):
    c, x = build(name, n_frames=1)
    # A few divergences are enough where there are many.
    chosen = [0, 30, 65] if c.n_constraints > 20 else list(range(c.n_constraints))

    def own(y, b):
        return displacement(c, y)[b]

    slope = torch.func.grad(lambda y: torch.linalg.slogdet(metric(c, y)).logabsdet)(x[0])
    found = metric_response(c, x)[0]
    for b in chosen:
        jacobian = torch.func.jacrev(lambda y, b=b: own(y, b))(x[0]).flatten(1)
        wanted = 0.5 * own(x[0], b) @ slope.flatten() + jacobian.trace()
        torch.testing.assert_close(found[b], wanted, atol=1e-8, rtol=1e-9)


def test_fixman_term():
    c, x = build("methyl")
    potential = Potential({"Fixman": Fixman(c, 310.0)}, n_particles=c.n_particles)
    check_potential(potential, x[0])
    wanted = 0.5 * BOLTZMANN * 310.0 * log_metric_determinant(c, x)
    torch.testing.assert_close(potential(x), wanted)
    torch.testing.assert_close(fixman_potential(c, x, 310.0), wanted)
    assert dict(potential.named_parameters()).keys() == {"Fixman.mass"}
    assert not any(p.requires_grad for p in potential.parameters())
    # Precision changes with the potential's; the caller's set stays as it is.
    assert potential.float()(x).dtype == torch.float32
    assert c.dtype == torch.float64
    with pytest.raises(InvalidInputError, match="temperature: got -1"):
        Fixman(c, -1.0)


def test_closed_form_of_an_angle():
    # det Z = (w1 + w2)(w2 + w3) - (w2 cos)^2 of two bonds that share atom 2.
    c, x = build("angle")
    w1, w2, w3 = 1 / c.masses.detach()
    a, b = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1]
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    wanted = ((w1 + w2) * (w2 + w3) - (w2 * cosine) ** 2).log()
    torch.testing.assert_close(log_metric_determinant(c, x), wanted)


def test_dependent_constraints_have_no_metric():
    x = torch.tensor([[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]], dtype=torch.float64)
    c = ConstraintSet([(0, 1), (1, 2), (0, 2)], [0.1, 0.1, 0.2], [1.0, 1.0, 1.0])
    with pytest.raises(ConstraintError, match="depend on each other"):
        log_metric_determinant(c, x)


# A trimer with two rigid bonds: everything by quadrature over its angle. --------------------------

TEMPERATURE = 300.0
KT = BOLTZMANN * TEMPERATURE
MASSES = (10.0, 4.0, 7.0)


class Spring(AbstractTerm):
    """A spring between the ends."""

    def __init__(self, k, length):
        super().__init__()
        self.add_parameter("k", torch.tensor(k, dtype=torch.float64), "kilojoule/mole")
        self.length = length

    def forward(self, positions, box, values, global_values):
        r = (positions[:, 2] - positions[:, 0]).norm(dim=-1)
        return 0.5 * values["k"] * (r - self.length) ** 2


def trimer(first, second, masses=MASSES, **options):
    return ConstraintSet([(0, 1), (1, 2)], [first, second], masses, **options)


def shape(cosine, first, second):
    """Positions of angles."""
    sine = (1 - cosine**2).sqrt()
    zero = torch.zeros_like(cosine)
    ends = torch.stack([second * cosine, second * sine, zero], dim=-1)
    middle = torch.zeros_like(ends)
    start = torch.stack([zero + first, zero, zero], dim=-1)
    return torch.stack([start, middle, ends], dim=-2)


def density(cosine, potential, lengths, constraints=None):
    """The distribution of the cosine on a grid, not normalised."""
    x = shape(cosine, *lengths)
    c = constraints or trimer(*lengths)
    with torch.no_grad():
        return torch.exp(0.5 * log_metric_determinant(c, x) - potential(x) / KT)


def nodes(n=300):
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy(x), torch.from_numpy(w)


OBSERVABLES = {
    "squared end-to-end distance": lambda f: (
        (f.positions[:, 2] - f.positions[:, 0]).square().sum(dim=-1)
    ),
    "cosine squared": lambda f: torch.nn.functional.cosine_similarity(
        f.positions[:, 0] - f.positions[:, 1], f.positions[:, 2] - f.positions[:, 1], dim=-1
    ).square(),
}
SPRINGS = {"soft": (50.0, 0.15), "stiff": (2000.0, 0.16), "none": (0.0, 0.1)}
LENGTHS = (0.1, 0.13)


def spring(name):
    return Potential({"spring": Spring(*SPRINGS[name])}, n_particles=3)


def exact(observable, potential, lengths, constraints=None):
    cosine, weight = nodes()
    p = weight * density(cosine, potential, lengths, constraints)
    o = observable(Frames(positions=shape(cosine, *lengths)))
    return float((p * o).sum() / p.sum())


def exact_derivative(observable, potential, bond, h=1e-5):
    values = []
    for t in (-2, -1, 1, 2):
        lengths = list(LENGTHS)
        lengths[bond] += t * h
        values.append(exact(observable, potential, lengths))
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)


def test_the_metric_of_an_equal_mass_trimer():
    # <cos^2> of a freely jointed rigid trimer is not 1/3; with Fixman's potential it is.
    c = trimer(0.1, 0.1, masses=(3.0, 3.0, 3.0))
    free = Potential({}, n_particles=3)
    observable = OBSERVABLES["cosine squared"]
    assert exact(observable, free, (0.1, 0.1), c) == pytest.approx(0.32102, abs=5e-6)
    corrected = Potential({"Fixman": Fixman(c, TEMPERATURE)}, n_particles=3)
    assert exact(observable, corrected, (0.1, 0.1), c) == pytest.approx(1 / 3, rel=1e-12)


def by_coarea(observable, potential, metric_terms=True):
    """The derivative in both lengths, with averages by quadrature."""
    cosine, weight = nodes()
    x = shape(cosine, *LENGTHS).requires_grad_()
    c = trimer(*LENGTHS)
    p = weight * density(cosine, potential, LENGTHS)
    p = (p / p.sum()).unsqueeze(-1)
    o = observable(Frames(positions=x))
    slope_o = torch.autograd.grad(o.sum(), x)[0]
    slope_u = -potential.forces(x.detach())
    slopes = length_response(c, x.detach(), torch.stack([slope_o, slope_u], dim=1))
    conjugate = slopes[:, 1] / KT
    if metric_terms:
        conjugate = conjugate - metric_response(c, x.detach())
    o = o.detach().unsqueeze(-1)
    found = (p * slopes[:, 0]).sum(dim=0) - (p * (o - (p * o).sum()) * conjugate).sum(dim=0)
    return found.detach()


@pytest.mark.parametrize("observable", OBSERVABLES)
@pytest.mark.parametrize("name", SPRINGS)
@pytest.mark.parametrize("bond", [0, 1])
def test_derivative_in_a_length_by_quadrature(name, observable, bond):
    potential, o = spring(name), OBSERVABLES[observable]
    wanted = exact_derivative(o, potential, bond)
    assert float(by_coarea(o, potential)[bond]) == pytest.approx(wanted, rel=1e-7, abs=1e-8)


def test_without_the_metric_terms_the_sign_is_wrong():
    # Without a spring an average over angles does not depend on lengths; the terms provide that.
    o = OBSERVABLES["cosine squared"]
    assert by_coarea(o, spring("none")).abs().max() < 1e-10
    assert by_coarea(o, spring("none"), metric_terms=False).abs().max() > 0.1
    o = OBSERVABLES["squared end-to-end distance"]
    hard = Potential({"spring": Spring(5000.0, 0.16)}, n_particles=3)
    for bond in range(2):
        wanted = exact_derivative(o, hard, bond)
        found = float(by_coarea(o, hard, metric_terms=False)[bond])
        assert found < -0.009 and wanted > 0.012
        assert float(by_coarea(o, hard)[bond]) == pytest.approx(wanted, rel=1e-6)


def sample(potential, n=4000, seed=3):
    """Independent frames by inversion of the cumulative distribution."""
    grid = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    grid = grid.clamp(-1 + 1e-9, 1 - 1e-9)
    cumulative = density(grid, potential, LENGTHS).cumsum(dim=0).numpy()
    random = np.random.default_rng(seed)
    cosine = np.interp(random.random(n) * cumulative[-1], cumulative, grid.numpy())
    return Frames(positions=shape(torch.from_numpy(cosine), *LENGTHS), sampled="NVT")


def stacked(frames):
    return torch.stack([o(frames) for o in OBSERVABLES.values()], dim=-1)


def test_estimates_from_frames():
    potential = spring("stiff")
    ensemble = Ensemble(potential, sample(potential), temperature=TEMPERATURE)
    c = trimer(*LENGTHS)
    found = length_derivative(ensemble, c, stacked)
    gradient, error = found.gradient["lengths"], found.gradient_standard_error["lengths"]
    assert gradient.shape == (2, 2)
    for k, observable in enumerate(OBSERVABLES.values()):
        for bond in range(2):
            wanted = exact_derivative(observable, potential, bond)
            assert abs(float(gradient[k, bond]) - wanted) < 4 * float(error[k, bond])
            assert float(error[k, bond]) < 0.2 * abs(wanted)
    assert found.bias == "consistent"
    # Directions combine lengths; both bonds together here.
    joint = length_derivative(ensemble, c, stacked, {"both": torch.tensor([1.0, 1.0])})
    torch.testing.assert_close(joint.gradient["both"], gradient.sum(dim=-1))
    # A function of the average obeys the chain rule.
    root = length_derivative(ensemble, c, stacked, function=torch.sqrt)
    chain = gradient / (2 * found.value.sqrt()[:, None])
    torch.testing.assert_close(root.gradient["lengths"], chain)


def test_free_energy_in_a_length():
    potential = spring("stiff")
    ensemble = Ensemble(potential, sample(potential), temperature=TEMPERATURE)
    found = length_mean_force(ensemble, trimer(*LENGTHS))["lengths"]

    def free_energy(lengths):
        # Volume elements of both bonds, which averages do not see.
        cosine, weight = nodes()
        integral = (weight * density(cosine, potential, lengths)).sum()
        return -KT * math.log(float(integral) * lengths[0] ** 2 * lengths[1] ** 2)

    for bond in range(2):
        h = 1e-5
        up, down = list(LENGTHS), list(LENGTHS)
        up[bond] += h
        down[bond] -= h
        wanted = (free_energy(up) - free_energy(down)) / (2 * h)
        error = float(found.standard_error[bond])
        assert abs(float(found.value[bond]) - wanted) < 4 * error
        assert error < 0.1 * abs(wanted)


def test_reweighted_frames():
    # Frames of one spring constant, the derivative at another.
    potential = spring("stiff")
    ensemble = Ensemble(potential, sample(potential, n=20000), temperature=TEMPERATURE)
    with torch.no_grad():
        potential.get_parameter("spring.k").mul_(1.2)
    found = length_derivative(ensemble, trimer(*LENGTHS), stacked)
    gradient, error = found.gradient["lengths"], found.gradient_standard_error["lengths"]
    for k, observable in enumerate(OBSERVABLES.values()):
        wanted = exact_derivative(observable, potential, 0)
        assert abs(float(gradient[k, 0]) - wanted) < 4 * float(error[k, 0])
    assert found.method == "reweighting"


def test_rigid_molecules_have_a_constant_metric():
    c, _ = build("triangle")
    x = normal(1, 3, 3)
    turned = x @ torch.linalg.qr(normal(5, 3, 3, seed=9))[0]
    found = metric_response(c, turned)
    torch.testing.assert_close(found, found[:1].expand_as(found))


def test_virtual_sites_follow():
    # A site halfway between the ends carries the spring to a fixed point; the same in closed form.
    sites = VirtualSites({3: AverageSite(parents=(0, 2), weights=(0.5, 0.5))}, n_particles=4)
    potential = spring("stiff")
    three = sample(potential, n=50)
    four = torch.cat([three.positions, torch.zeros(50, 1, 3, dtype=torch.float64)], dim=1)
    c = trimer(*LENGTHS, masses=(*MASSES, 0.0), sites=sites)
    wide = Potential({"spring": Spring(*SPRINGS["stiff"])}, n_particles=4, sites=sites)
    ensemble = Ensemble(wide, Frames(positions=four), temperature=TEMPERATURE)
    narrow = Ensemble(potential, three, temperature=TEMPERATURE)
    found = length_derivative(ensemble, c, lambda f: f.positions[:, 3].square().sum(dim=-1))
    wanted = length_derivative(
        narrow,
        trimer(*LENGTHS),
        lambda f: (0.5 * (f.positions[:, 0] + f.positions[:, 2])).square().sum(dim=-1),
    )
    torch.testing.assert_close(found.gradient["lengths"], wanted.gradient["lengths"])
    torch.testing.assert_close(found.value, wanted.value)


def test_what_is_refused():
    potential = spring("stiff")
    frames = sample(potential, n=10)
    ensemble = Ensemble(potential, frames, temperature=TEMPERATURE)
    with pytest.raises(WrongEnsembleError, match="frames: a constrained length is off by"):
        length_derivative(ensemble, trimer(0.11, 0.13), stacked)
    with pytest.raises(InvalidInputError, match="constraints: have 4 particles, the frames 3"):
        length_derivative(ensemble, trimer(*LENGTHS, masses=(*MASSES, 1.0)), stacked)
    with pytest.raises(InvalidInputError, match=r"directions\['d'\]: got shape \(3,\), wanted"):
        length_derivative(ensemble, trimer(*LENGTHS), stacked, {"d": torch.ones(3)})
    with pytest.raises(UnsupportedDerivativeError, match="observable: depends on positions but"):
        length_derivative(
            ensemble, trimer(*LENGTHS), lambda f: (f.positions[:, 2, 0] > 0.05).double()
        )
    with pytest.raises(UnsupportedDerivativeError, match="observable: depends on positions but"):
        length_derivative(ensemble, trimer(*LENGTHS), lambda f: stacked(f).detach())
    # What does not depend on positions has a derivative: through the distribution.
    boxed = Frames(
        positions=frames.positions, box=torch.eye(3, dtype=torch.float64).expand(10, 3, 3)
    )
    ensemble = Ensemble(potential, boxed, temperature=TEMPERATURE)
    found = length_derivative(ensemble, trimer(*LENGTHS), Volume())
    assert float(found.gradient["lengths"].abs().max()) < 1e-12
