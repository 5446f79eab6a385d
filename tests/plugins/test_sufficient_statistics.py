"""Statistics of frames against the potential that they were collected from."""

import copy

import pytest
import torch
from mdgraft import Frames, InvalidInputError, Potential, plain_kernels
from mdgraft._units import BOLTZMANN
from mdgraft.ensembles import Covariance, Ensemble, PotentialEnergy
from mdgraft.ensembles.sufficient_statistics import SufficientStatistics
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.bonded import HarmonicBond
from mdgraft.potentials.nonbonded import Method, Nonbonded, NonbondedSettings, Offsets
from torch.func import functional_call

T = 300.0
N, N_FRAMES = 27, 6
BOX = 1.5
KINDS = torch.arange(N) % 3
SIGMA, EPSILON = (0.31, 0.36, 0.28), (0.65, 1.1, 0.0)
PAIRS = torch.tensor([[0, 1], [3, 4], [6, 7], [9, 10], [0, 4]])
OPEN = frozenset((Method.NO_CUTOFF, Method.CUTOFF_NON_PERIODIC))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def lattice_frames(n_frames=N_FRAMES, box=BOX, seed=0, **options):
    """Particles near a lattice, in boxes of different size."""
    axes = [torch.arange(3, dtype=torch.float64) * box / 3] * 3
    sites = torch.cartesian_prod(*axes)
    generator = torch.Generator().manual_seed(seed)
    shape = (n_frames, N, 3)
    jitter = 0.03 * torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.98, 1.03, n_frames, dtype=torch.float64)[:, None, None]
    boxes = scale * box * torch.eye(3, dtype=torch.float64)
    return Frames(positions=scale * (sites + jitter), box=boxes, **options)


def mixture(method=Method.CUTOFF_PERIODIC, switch=True, tail=True, bonds=False, **options):
    """Three kinds of particles, one without epsilon, and exceptions of two kinds."""
    # Without rounding: the mesh of PME is as good as any other here.
    settings = NonbondedSettings(
        method=method,
        cutoff=float("inf") if method is Method.NO_CUTOFF else 0.7,
        alpha=4.0,
        grid=(16, 16, 16),
        dispersion_alpha=4.0 if method is Method.LJPME else 0.0,
        dispersion_grid=(16, 16, 16),
        dispersion_correction=tail and method not in OPEN,
    )
    term = Nonbonded(
        tensor((0.3, -0.5, 0.2))[KINDS],
        tensor(SIGMA)[KINDS],
        tensor(EPSILON)[KINDS],
        exceptions=PAIRS,
        exception_charge_product=tensor([0.0, -0.1, -0.1, -0.1, 0.0]),
        exception_sigma=tensor([1.0, 0.3, 0.3, 0.3, 1.0]),
        exception_epsilon=tensor([0.0, 0.4, 0.4, 0.4, 0.0]),
        settings=settings,
        switching_distance=tensor(0.6) if switch and method is not Method.NO_CUTOFF else None,
        reaction_field_dielectric=tensor(78.0),
        **options,
    )
    terms = {"nb": term}
    if bonds:
        terms["bonds"] = HarmonicBond(
            PAIRS, torch.full((5,), 0.45), torch.full((5,), 900.0), periodic=True
        ).double()
    return Potential(terms, n_particles=N)


def tie_kinds(potential, kinds=(0, 1)):
    names = []
    for kind in kinds:
        for quantity in ("sigma", "epsilon"):
            potential.tie(f"{quantity}_{kind}", {f"nb.{quantity}": kind == KINDS})
            names.append(f"tied.{quantity}_{kind}")
    return names


def changed(potential, names, size=0.08):
    """Other values of these parameters, some larger and some smaller."""
    generator = torch.Generator().manual_seed(1)
    values = {}
    for name in names:
        value = potential.get_parameter(name).detach()
        factor = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        values[name] = value * (1 + size * (2 * factor - 1).sign() * (0.5 + factor))
    return values


def reference(potential, frames, values):
    return functional_call(potential, values, (frames.positions, frames.box))


def close(value, exact, tolerance=1e-10):
    scale = exact.abs().max()
    return bool((value - exact).abs().max() <= tolerance * scale)


def assert_same_function(statistics, potential, frames, *, order=2):
    """Energies, gradients of every frame and a second derivative at changed parameters."""
    names = statistics.names
    values = changed(potential, names)
    exact = reference(potential, frames, values).detach()
    assert not close(statistics.generating_energies, exact, 1e-6)
    assert close(statistics.energies(values), exact)

    def energies(values):
        return reference(potential, frames, values)

    jacobian = torch.func.jacrev(energies)(values)
    own = torch.func.jacrev(statistics.energies)(values)
    flat = statistics.gradients(values)
    columns = flat.split([values[name].numel() for name in names], dim=1)
    for name, column in zip(names, columns, strict=True):
        assert close(own[name], jacobian[name]), name
        assert close(column, jacobian[name].reshape(len(frames), -1)), name
    if order < 2:
        return
    mix = torch.linspace(-1.0, 1.5, len(frames), dtype=torch.float64)
    wanted = torch.func.hessian(lambda v: mix @ energies(v))(values)
    found = torch.func.hessian(lambda v: mix @ statistics.energies(v))(values)
    scale = {n: values[n].abs().max() for n in names}
    largest = max((wanted[a][b] * scale[a] * scale[b]).abs().max() for a in names for b in names)
    for a in names:
        for b in names:
            error = (found[a][b] - wanted[a][b]) * scale[a] * scale[b]
            assert error.abs().max() <= 1e-10 * largest, (a, b)


# Lennard-Jones ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"switch": False, "tail": False},
        {"method": Method.NO_CUTOFF},
        {"method": Method.CUTOFF_NON_PERIODIC},
    ],
    ids=["switch and tail", "truncated", "no cutoff", "open cutoff"],
)
@pytest.mark.parametrize("kinds", [(0, 1), (0,)], ids=["all", "one of two"])
def test_lennard_jones_mixture(options, kinds):
    potential, frames = mixture(**options), lattice_frames()
    names = tie_kinds(potential, kinds)
    statistics = SufficientStatistics.collect(potential, frames, names)
    assert len(statistics.polynomial) == 0
    assert_same_function(statistics, potential, frames)


def test_lennard_jones_of_plain_kernels():
    potential, frames = mixture(), lattice_frames()
    names = tie_kinds(potential)
    with plain_kernels():
        statistics = SufficientStatistics.collect(potential, frames, names, batch_size=4)
        assert_same_function(statistics, potential, frames)


def test_values_far_away_are_exact():
    """The form holds for all sigma and epsilon, not only near the point of collection."""
    potential, frames = mixture(), lattice_frames()
    names = tie_kinds(potential)
    statistics = SufficientStatistics.collect(potential, frames, names)
    values = dict(zip(names, tensor([0.1, 3.0, 0.6, 0.01]), strict=True))
    exact = reference(potential, frames, values).detach()
    assert close(statistics.energies(values), exact)


def test_multiples_of_one_value_and_exceptions():
    """Sigma of two kinds in a fixed ratio; exceptions whose epsilon is half that of a kind."""
    potential, frames = mixture(), lattice_frames()
    moving = KINDS < 2
    factors = tensor([1.0, 1.2])[KINDS[moving]]
    potential.tie("size", {"nb.sigma": (moving, factors)}, value=0.3)
    own = torch.tensor([1, 2, 3])
    potential.tie("depth", {"nb.epsilon": KINDS == 0, "nb.exception_epsilon": (own, 0.5)}, value=1)
    potential.tie("reach", {"nb.exception_sigma": own})
    names = ["tied.size", "tied.depth", "tied.reach"]
    statistics = SufficientStatistics.collect(potential, frames, names)
    assert_same_function(statistics, potential, frames)


def test_whole_parameters():
    """A name may hold many numbers."""
    potential, frames = mixture(), lattice_frames()
    names = ["nb.exception_sigma", "nb.exception_epsilon", "nb.exception_charge_product"]
    statistics = SufficientStatistics.collect(potential, frames, names)
    assert_same_function(statistics, potential, frames)


def test_a_type_without_epsilon_has_no_sigma():
    potential, frames = mixture(), lattice_frames()
    potential.tie("none", {"nb.sigma": KINDS == 2})
    statistics = SufficientStatistics.collect(potential, frames, ["tied.none"])
    assert torch.equal(statistics.energies({"tied.none": 0.7}), statistics.generating_energies)


# Mixtures of parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Method.PME, Method.CUTOFF_PERIODIC, Method.EWALD])
def test_all_kinds_of_parameters(method):
    potential, frames = mixture(method, bonds=True), lattice_frames()
    names = tie_kinds(potential)
    potential.tie(
        "q", {"nb.charge": KINDS == 0, "nb.exception_charge_product": (1, 0.2)}, value=0.3
    )
    potential.tie("k", {"bonds.k": None})
    names += ["tied.q", "tied.k", "nb.exception_epsilon"]
    statistics = SufficientStatistics.collect(potential, frames, names)
    assert_same_function(statistics, potential, frames, order=1 if method is Method.EWALD else 2)


def test_one_value_in_both_forms():
    """A number that is a well depth here and a charge there."""
    potential, frames = mixture(), lattice_frames()
    potential.tie("both", {"nb.epsilon": KINDS == 0, "nb.charge": (KINDS == 1, -0.5)}, value=0.7)
    potential.tie("q", {"nb.charge": KINDS == 0})
    statistics = SufficientStatistics.collect(potential, frames, ["tied.both", "tied.q"])
    assert_same_function(statistics, potential, frames)


def test_charge_offsets():
    offsets = Offsets(
        target=torch.tensor([0, 5]),
        parameter=torch.tensor([0, 0]),
        scales=tensor([[0.4, 0.0, 0.0], [-0.4, 0.0, 0.0]]),
        active=torch.tensor([True, True]),
    )
    term = mixture(
        global_names=("turned",), global_defaults=tensor([0.5]), particle_offsets=offsets
    ).term("nb")
    potential = Potential({"nb": term}, n_particles=N, global_parameters={"turned": tensor(0.5)})
    names = [*tie_kinds(potential), "globals.turned"]
    frames = lattice_frames()
    statistics = SufficientStatistics.collect(potential, frames, names)
    assert_same_function(statistics, potential, frames)
    # Offset and scale together are of the fourth order.
    scale = "nb.particle_offset_charge_scale"
    with pytest.raises(InvalidInputError, match=r"higher than second order.*globals\.turned"):
        SufficientStatistics.collect(potential, frames, ["globals.turned", scale])
    with torch.no_grad():
        term.get_parameter("particle_offset_epsilon_scale").fill_(0.1)
    with pytest.raises(InvalidInputError, match=r"epsilon of 'nb' has parameter offsets"):
        SufficientStatistics.collect(potential, frames, names)


# Averages -----------------------------------------------------------------------------------------


def test_reweighted_average_is_that_of_the_ensemble():
    potential, frames = mixture(bonds=True), lattice_frames(40, sampled="NPT")
    names = tie_kinds(potential)
    potential.tie("q", {"nb.charge": KINDS == 0})
    potential.tie("k", {"bonds.k": None})
    names += ["tied.q", "tied.k"]
    covariance = Covariance(min_ess=0.0, max_pareto_k=100.0)
    ensemble = Ensemble(potential, frames, temperature=T, pressure=1.0, gradient=covariance)
    statistics = SufficientStatistics.collect(potential, frames, names)
    values = changed(potential, names, size=0.08)
    with torch.no_grad():
        for name, value in values.items():
            potential.get_parameter(name).copy_(value)

    parameters = {name: potential.get_parameter(name) for name in names}
    log_weights = statistics.log_weights(parameters, temperature=T)
    overlap = covariance.overlap(log_weights)
    covariance.require(overlap)
    assert 2 < overlap.effective_sample_size < 36
    assert overlap.effective_sample_size == pytest.approx(ensemble.overlap().effective_sample_size)
    weights = log_weights.softmax(dim=0)
    assert close(weights, ensemble.weights())

    def radius(batch):
        return batch.positions.square().sum(dim=-1).mean(dim=-1)

    pairs = [
        (weights @ radius(frames), radius),
        (weights @ statistics.energies(parameters), PotentialEnergy(potential)),
    ]
    for own, observable in pairs:
        average = ensemble.average(observable)
        assert close(own, average)
        wanted = torch.autograd.grad(average, list(parameters.values()))
        found = torch.autograd.grad(own, list(parameters.values()), retain_graph=True)
        for name, a, b in zip(names, found, wanted, strict=True):
            assert a.item() == pytest.approx(b.item(), rel=1e-9), name
    change = statistics.energies(parameters) - statistics.generating_energies
    assert close(log_weights, -change / (BOLTZMANN * T))


def test_energies_at_the_point_of_collection():
    potential, frames = mixture(), lattice_frames()
    names = tie_kinds(potential)
    before = {name: p.detach().clone() for name, p in potential.named_parameters()}
    potential.freeze("*")
    statistics = SufficientStatistics.collect(potential, frames, names)
    assert torch.equal(statistics.energies({}), potential(frames.positions, frames.box))
    for name, parameter in potential.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad


def test_selection_of_frames():
    potential, frames = mixture(bonds=True), lattice_frames()
    names = [*tie_kinds(potential), "nb.exception_sigma"]
    potential.tie("k", {"bonds.k": None})
    statistics = SufficientStatistics.collect(potential, frames, [*names, "tied.k"])
    values = changed(potential, names)
    part = statistics[1:4]
    assert len(part) == 3 and len(statistics) == N_FRAMES
    torch.testing.assert_close(part.energies(values), statistics.energies(values)[1:4])
    with pytest.raises(InvalidInputError, match="slice or a list"):
        statistics[0]


# Errors -------------------------------------------------------------------------------------------


class Peaks(AbstractTerm):
    """Energies that are cubic, and cubic in three parameters together."""

    def __init__(self):
        super().__init__()
        for name in ("cube", "one", "two", "three", "line"):
            self.add_parameter(name, tensor(0.5), "")

    def forward(self, positions, box, values, global_values):
        x = positions.square().sum(dim=(-2, -1))
        v = values
        return x * (v["cube"] ** 3 + v["one"] * v["two"] * v["three"]) + v["line"] * x


def collect(potential, names, frames=None):
    return SufficientStatistics.collect(potential, frames or lattice_frames(), names)


def test_lengths_are_quadratic_but_not_together_with_force_constants():
    potential = mixture(bonds=True)
    potential.tie("k", {"bonds.k": None})
    potential.tie("length", {"bonds.length": None})
    names = tie_kinds(potential)
    for name in ("tied.k", "tied.length"):
        assert_same_function(collect(potential, [*names, name]), potential, lattice_frames())
    with pytest.raises(InvalidInputError, match=r"\[\('tied\.k', 'tied\.length'\)\]"):
        collect(potential, [*names, "tied.k", "tied.length"])


def test_other_functions_are_named():
    potential = Potential({"peaks": Peaks()}, n_particles=N)
    names = ["peaks.one", "peaks.two", "peaks.line"]
    statistics = collect(potential, names)
    assert_same_function(statistics, potential, lattice_frames())
    with pytest.raises(InvalidInputError, match=r"nor quadratic in \['peaks\.cube'\]"):
        collect(potential, [*names, "peaks.cube"])
    with pytest.raises(InvalidInputError, match=r"\('peaks\.one', 'peaks\.three', 'peaks\.two'\)"):
        collect(potential, ["peaks.one", "peaks.three", "peaks.two"])
    mixed = mixture()
    switch = ["nb.switching_distance", "nb.exception_epsilon"]
    with pytest.raises(InvalidInputError, match=r"\['nb\.switching_distance'\].*mdgraft\.Ensemble"):
        collect(mixed, switch)


def test_dispersion_meshes():
    potential = mixture(Method.LJPME)
    with pytest.raises(InvalidInputError, match="reciprocal-space sum of LJPME"):
        collect(potential, tie_kinds(potential))
    # Exceptions and charges are no part of that mesh.
    names = ["nb.exception_epsilon", "nb.exception_sigma"]
    assert_same_function(collect(potential, names), potential, lattice_frames())


@pytest.mark.parametrize("names", ["nb.charge", [], ["nb.none"], ["nb.charge", "nb.charge"]])
def test_wrong_names(names):
    with pytest.raises(InvalidInputError, match=r"names: got .* wanted some of"):
        collect(mixture(), names)


def test_wrong_input():
    potential, frames = mixture(), lattice_frames()
    with pytest.raises(InvalidInputError, match=r"use potential\.double"):
        collect(copy.deepcopy(potential).float(), ["nb.exception_epsilon"])
    with pytest.raises(InvalidInputError, match="tie entries that change together"):
        collect(potential, ["nb.charge"], lattice_frames(200_000))
    with pytest.raises(InvalidInputError, match="frames: got Tensor"):
        SufficientStatistics.collect(potential, frames.positions, ["nb.exception_epsilon"])
    statistics = collect(potential, ["nb.exception_epsilon"])
    with pytest.raises(InvalidInputError, match=r"no statistics of \['nb\.charge'\]"):
        statistics.energies({"nb.charge": 1.0})
    with pytest.raises(InvalidInputError, match=r"got shape \(\), wanted \(5,\)"):
        statistics.energies({"nb.exception_epsilon": 1.0})
