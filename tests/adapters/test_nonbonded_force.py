"""NonbondedForce: every method and option against OpenMM's Reference platform."""

import copy
import dataclasses
import functools
import itertools
import math
import sys
import zlib

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from torch.func import functional_call

METHODS = ("NoCutoff", "CutoffNonPeriodic", "CutoffPeriodic", "Ewald", "PME", "LJPME")
PERIODIC = METHODS[2:]
CUTOFF = 0.9


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination of options; the system it stands for is random but fixed."""

    method: str
    triclinic: bool = False
    switch: bool = False
    offsets: bool = False
    exceptions_periodic: bool = False
    dispersion: bool = True
    reciprocal_only: bool = False
    net_charge: float = 0.3

    @property
    def label(self):
        flags = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is True]
        return "-".join([self.method, *flags])


CASES = [
    *(Case(method) for method in METHODS),
    *(Case(method, offsets=True, switch=True) for method in METHODS),
    *(Case(m, triclinic=True, exceptions_periodic=True) for m in ("CutoffPeriodic", "PME")),
    Case("LJPME", triclinic=True, exceptions_periodic=True, offsets=True),
    Case("Ewald", exceptions_periodic=True, dispersion=False),
    Case("PME", triclinic=True, switch=True, offsets=True, exceptions_periodic=True),
    Case("PME", reciprocal_only=True),
    Case("PME", net_charge=0.0, dispersion=False),
]


@dataclasses.dataclass
class Built:
    system: openmm.System
    positions: np.ndarray
    box: np.ndarray

    def context(self, system=None, positions=None, box=None):
        context = openmm.Context(
            system or self.system,
            openmm.VerletIntegrator(0.001),
            openmm.Platform.getPlatformByName("Reference"),
        )
        context.setPeriodicBoxVectors(*(self.box if box is None else box))
        context.setPositions(self.positions if positions is None else positions)
        return context

    def energy(self, **changes):
        state = self.context(**changes).getState(energy=True)
        return state.getPotentialEnergy()._value

    def forces(self, **changes):
        state = self.context(**changes).getState(forces=True)
        return np.array(state.getForces(asNumpy=True)._value)

    @property
    def x(self):
        return torch.tensor(self.positions)

    @property
    def h(self):
        return torch.tensor(self.box)


def build(case, n=48):
    """Atoms scattered over several images of a box, a few of them without dispersion."""
    rng = np.random.default_rng(zlib.crc32(case.label.encode()))
    system, force = openmm.System(), openmm.NonbondedForce()
    system.addForce(force)
    box = np.diag([2.1, 2.3, 2.2])
    if case.triclinic:
        box[1, 0], box[2, 0], box[2, 1] = 0.7, -0.5, 0.6
    system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in box))
    # Molecules of three atoms on a lattice, in several images of the box.
    lattice = np.array(list(itertools.product(range(4), repeat=3))) / 4
    molecules = lattice[rng.permutation(len(lattice))[: n // 3]] + rng.integers(-1, 2, (n // 3, 3))
    axis = rng.normal(size=(n // 3, 3))
    axis *= 0.13 / np.linalg.norm(axis, axis=1, keepdims=True)
    positions = np.repeat(molecules @ box, 3, axis=0) + rng.normal(size=(n, 3)) * 0.01
    positions[1::3] += axis
    positions[2::3] -= axis
    if case.exceptions_periodic:
        positions += rng.integers(-1, 2, size=(n, 3)) @ box
    for i in range(n):
        system.addParticle(12.0)
        epsilon = 0.0 if i % 7 == 0 else rng.uniform(0.2, 1.2)
        charge = rng.normal() * 0.4
        force.addParticle(charge, rng.uniform(0.2, 0.35), epsilon)
    total = sum(force.getParticleParameters(i)[0]._value for i in range(n))
    for i in range(n):
        charge, sigma, epsilon = force.getParticleParameters(i)
        force.setParticleParameters(
            i, charge._value + (case.net_charge - total) / n, sigma, epsilon
        )
    for i in range(0, n - 2, 3):
        force.addException(i, i + 1, 0.0, 0.1, 0.0)
        force.addException(i + 2, i, 0.1 * rng.normal(), 0.25, 0.3)
    force.setNonbondedMethod(getattr(openmm.NonbondedForce, case.method))
    force.setCutoffDistance(CUTOFF)
    force.setUseSwitchingFunction(case.switch and case.method != "LJPME")
    force.setSwitchingDistance(0.7)
    force.setUseDispersionCorrection(case.dispersion)
    force.setExceptionsUsePeriodicBoundaryConditions(case.exceptions_periodic)
    force.setIncludeDirectSpace(not case.reciprocal_only)
    if case.offsets:
        force.addGlobalParameter("lambda", 0.4)
        force.addGlobalParameter("training", -0.3)
        for i in range(1, n, 4):
            force.addParticleParameterOffset("lambda", i, 0.3 * rng.normal(), 0.02, 0.3)
        for i in range(2, n, 5):
            force.addParticleParameterOffset("training", i, 0.3 * rng.normal(), 0.02, -0.1)
        force.addExceptionParameterOffset("lambda", 0, 0.1, 0.02, 0.2)
        force.addExceptionParameterOffset("training", 1, 0.2, 0.01, -0.2)
    return Built(system, positions, box)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.label)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def built(case):
    return build(case)


@pytest.fixture
def potential(built):
    return mdgraft.graft(built.system)


def lower_triangle(case):
    """The box elements that OpenMM lets a user change."""
    if case.method not in PERIODIC:
        return []
    if case.method == "Ewald":
        return [(0, 0), (1, 1), (2, 2)]
    return [(i, j) for i in range(3) for j in range(i + 1)]


def test_energy_and_forces(built, potential):
    energy = built.energy()
    assert potential(built.x, built.h).item() == pytest.approx(energy, rel=1e-9, abs=1e-9)
    expected = built.forces()
    scale = np.sqrt((expected**2).mean())
    np.testing.assert_allclose(
        potential.forces(built.x, built.h).detach(), expected, rtol=1e-9, atol=1e-11 * scale
    )


def test_box_derivative(case, built, potential):
    elements = lower_triangle(case)
    if not elements:
        assert potential.periodic is False
        assert potential(built.x).item() == potential(built.x, built.h).item()
        return
    box = built.h.requires_grad_()
    (gradient,) = torch.autograd.grad(potential(built.x, box), box)
    step = 2e-6
    for i, j in elements:
        moved = []
        for sign in (1, -1):
            other = built.box.copy()
            other[i, j] += sign * step
            moved.append(built.energy(box=other))
        expected = (moved[0] - moved[1]) / (2 * step)
        scale = gradient.abs().max().item()
        assert gradient[i, j].item() == pytest.approx(expected, rel=1e-6, abs=1e-7 * scale)


def test_every_parameter(built, potential):
    """One random direction for each parameter, by central differences through OpenMM."""
    rng = np.random.default_rng(7)
    potential(built.x, built.h).backward()
    energy_scale = abs(built.energy()) + 1.0
    for name, parameter in potential.named_parameters():
        direction = torch.tensor(rng.normal(size=parameter.shape))
        if name.endswith("epsilon"):
            # OpenMM admits no negative well depth, so 0 has no central difference.
            direction = direction * (parameter.detach() != 0)
        if name.startswith("NonbondedForce.exception_") and not name.endswith("_scale"):
            excluded = potential.get_parameter("NonbondedForce.exception_epsilon") == 0
            # Excluded pairs repel by about 1e9 kJ/mol: differences with OpenMM lose their digits.
            direction = direction * ~excluded
        step = 1e-5
        energies = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
            if name.startswith("globals."):
                context = built.context()
                context.setParameter(name.removeprefix("globals."), parameter.item())
                energies.append(context.getState(energy=True).getPotentialEnergy()._value)
            else:
                system = copy.deepcopy(built.system)
                mdgraft_openmm.write_parameters(potential, system)
                energies.append(built.energy(system=system))
            with torch.no_grad():
                parameter.sub_(sign * step * direction)
        expected = (energies[0] - energies[1]) / (2 * step)
        # Without direct space, Lennard-Jones parameters do not enter at all.
        gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
        actual = (gradient * direction).sum().item()
        noise = 1e-15 * energy_scale / step * 10
        assert actual == pytest.approx(expected, rel=2e-6, abs=2e-7 + noise), name


def test_hessian_vector_product(built, potential):
    vector = torch.tensor(np.random.default_rng(8).normal(size=built.positions.shape))
    _, product = torch.func.jvp(lambda x: potential.forces(x, built.h), (built.x,), (vector,))
    step = 1e-6
    ahead, behind = (
        built.forces(positions=built.positions + sign * step * vector.numpy()) for sign in (1, -1)
    )
    expected = (ahead - behind) / (2 * step)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(product.detach(), expected, rtol=1e-6, atol=2e-8 * scale)


def test_batches_and_transforms(built, potential):
    rng = np.random.default_rng(9)
    frames = built.x + 0.01 * torch.tensor(rng.normal(size=(3, 2, *built.positions.shape)))
    energies = potential(frames, built.h)
    one_by_one = torch.stack([potential(x, built.h) for x in frames.flatten(0, 1)])
    torch.testing.assert_close(energies.flatten(), one_by_one, rtol=1e-12, atol=1e-10)
    assert potential(frames[:0], built.h).shape == (0, 2)
    boxes = built.h.expand(3, 2, 3, 3)
    vectorised = torch.vmap(torch.vmap(potential))(frames, boxes)
    torch.testing.assert_close(vectorised, energies, rtol=1e-12, atol=1e-10)

    parameters = {name: value.detach() for name, value in potential.named_parameters()}

    def energy(values):
        return functional_call(potential, values, (built.x, built.h))

    gradients = torch.func.grad(energy)(parameters)
    potential(built.x, built.h).backward()
    for name, parameter in potential.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-12, atol=1e-9)


def clear_caches():
    for name in [name for name in sys.modules if name.startswith("mdgraft.")]:
        for member in vars(sys.modules[name]).values():
            if isinstance(member, functools._lru_cache_wrapper):
                member.cache_clear()


@pytest.mark.parametrize("method", METHODS)
def test_first_use_inside_a_transform_leaves_nothing_behind(method):
    """What is cached in nested transforms must not belong to them."""
    built = build(Case(method), n=6)
    potential = mdgraft.graft(built.system)
    expected = potential.forces(built.x, built.h)

    def forces(x):
        return potential.forces(x, built.h)

    clear_caches()
    torch.func.jvp(forces, (built.x,), (built.x,))
    torch.testing.assert_close(forces(built.x), expected)
    clear_caches()
    torch.vmap(forces)(built.x.expand(2, -1, -1))
    torch.testing.assert_close(forces(built.x), expected)


def test_single_precision(built, potential):
    single = mdgraft.graft(built.system, dtype=torch.float32)
    energy = single(built.x.float(), built.h.float())
    assert energy.dtype == torch.float32
    scale = np.sqrt((built.forces() ** 2).mean())
    magnitude = abs(built.energy()) + 100
    assert energy.item() == pytest.approx(built.energy(), abs=1e-5 * magnitude)
    difference = single.forces(built.x, built.h).double() - potential.forces(built.x, built.h)
    assert difference.abs().max().item() < 1e-3 * scale


def test_translation(built, potential):
    shift = torch.tensor([0.31, -1.7, 0.9], dtype=torch.float64)
    moved = potential(built.x + shift, built.h).item()
    # A mesh breaks translation at the accuracy of PME; without one it is exact.
    if potential.term("NonbondedForce").settings.method.value not in ("PME", "LJPME"):
        assert moved == pytest.approx(potential(built.x, built.h).item(), rel=1e-10, abs=1e-9)
    wrapped = built.x + torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64) @ built.h
    same = potential(wrapped, built.h).item()
    assert same == pytest.approx(potential(built.x, built.h).item(), rel=1e-10, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_finite_where_interactions_vanish(method):
    """Coincident excluded atoms; sigma = epsilon = 0; a net charge; to second order."""
    system, force = openmm.System(), openmm.NonbondedForce()
    system.addForce(force)
    system.setDefaultPeriodicBoxVectors((2, 0, 0), (0, 2, 0), (0, 0, 2))
    parameters = [(0.4, 0.3, 0.5), (-0.4, 0.0, 0.0), (0.2, 0.25, 0.0), (0.1, 0.3, 0.4)]
    for row in parameters:
        system.addParticle(1)
        force.addParticle(*row)
    force.addException(0, 1, 0.0, 1.0, 0.0)
    force.addException(2, 1, 0.0, 0.0, 0.0)
    force.setNonbondedMethod(getattr(openmm.NonbondedForce, method))
    force.setCutoffDistance(0.9)
    potential = mdgraft.graft(system)
    x = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.1], [0.1, 0.1, 0.5], [0.6, 0.4, 0.3]])
    x = x.double().requires_grad_()
    box = (2 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    inputs = [x, *potential.parameters()] + ([box] if potential.periodic else [])
    energy = potential(x, box)
    first = torch.autograd.grad(energy, inputs, create_graph=True)
    assert all(torch.isfinite(g).all() for g in first)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), inputs, allow_unused=True)
    assert all(torch.isfinite(g).all() for g in second if g is not None)
    reference = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    reference.setPositions(x.detach().numpy())
    expected = reference.getState(energy=True).getPotentialEnergy()._value
    if method != "LJPME":  # OpenMM's exclusion of dispersion is 0/0 at zero distance
        assert energy.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["Context", "System"])
def test_pme_settings_of_the_host(kind):
    """Explicit alpha and grid are used; a Context is asked for those it runs with."""
    built = build(Case("PME", triclinic=True))
    force = built.system.getForce(0)
    force.setPMEParameters(3.1, 17, 20, 18)
    context = built.context()
    potential = mdgraft.graft(context if kind == "Context" else built.system)
    settings = potential.term("NonbondedForce").settings
    assert (settings.alpha, settings.grid) == (3.1, (17, 20, 18))
    assert potential(built.x, built.h).item() == pytest.approx(built.energy(), rel=1e-10)


def test_cpu_platform_grid_is_taken_from_the_context():
    built = build(Case("PME"))
    context = openmm.Context(
        built.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("CPU")
    )
    context.setPositions(built.positions)
    settings = mdgraft.graft(context).term("NonbondedForce").settings
    alpha, *grid = built.system.getForce(0).getPMEParametersInContext(context)
    assert (settings.alpha, list(settings.grid)) == (alpha, grid)


def test_cpu_platform_needs_positions_first():
    built = build(Case("PME"))
    platform = openmm.Platform.getPlatformByName("CPU")
    context = openmm.Context(built.system, openmm.VerletIntegrator(0.001), platform)
    with pytest.raises(mdgraft.InvalidInputError, match="set its positions first"):
        mdgraft.graft(context)


def test_context_supplies_global_parameters():
    built = build(Case("PME", offsets=True))
    context = built.context()
    context.setParameter("lambda", 0.9)
    potential = mdgraft.graft(context)
    assert potential.values()["globals.lambda"].item() == 0.9
    expected = context.getState(energy=True).getPotentialEnergy()._value
    assert potential(built.x, built.h).item() == pytest.approx(expected, rel=1e-10)


def test_repeated_offsets_follow_openmm():
    """The last offset of a particle and parameter wins, though the tail counts them all."""
    built = build(Case("CutoffPeriodic", offsets=True))
    built.system.getForce(0).addParticleParameterOffset("lambda", 1, 0.1, 0.01, 0.2)
    potential = mdgraft.graft(built.system)
    assert potential(built.x, built.h).item() == pytest.approx(built.energy(), rel=1e-9)


def test_sodium_chloride_madelung_energy():
    """U = -1.747564594633182 k q^2 / r0 for each ion pair, dU/dr0 = -U/r0, q dU/dq = 2 U."""
    spacing, n = 0.28, 4
    system, force = openmm.System(), openmm.NonbondedForce()
    system.addForce(force)
    length = spacing * n
    system.setDefaultPeriodicBoxVectors((length, 0, 0), (0, length, 0), (0, 0, length))
    sites = np.array(list(itertools.product(range(n), repeat=3)))
    for site in sites:
        system.addParticle(1)
        force.addParticle(1.0 if site.sum() % 2 else -1.0, 0.1, 0.0)
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    force.setCutoffDistance(0.55)
    force.setEwaldErrorTolerance(1e-7)
    potential = mdgraft.graft(system)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = torch.tensor(sites * spacing)
    box = length * torch.eye(3, dtype=torch.float64)
    energy = potential(scale * x, scale * box)
    expected = -1.747564594633182 * 138.93545764438198 / spacing * n**3 / 2
    assert energy.item() == pytest.approx(expected, rel=5e-8)
    energy.backward()
    assert scale.grad.item() == pytest.approx(-expected, rel=1e-6)
    charge = potential.get_parameter("NonbondedForce.charge")
    assert (charge * charge.grad).sum().item() == pytest.approx(2 * energy.item(), rel=1e-10)


BAD = {
    "particles": (
        lambda s, f: s.addParticle(1.0),
        r"NonbondedForce: has 48 particles, the System 49",
    ),
    "switch": (
        lambda s, f: (f.setUseSwitchingFunction(True), f.setSwitchingDistance(0.95)),
        r"switching_distance: 0.95 nm is not between 0 and the cutoff, 0.9 nm",
    ),
    "switch without cutoff": (
        lambda s, f: (
            f.setNonbondedMethod(f.NoCutoff),
            f.setUseSwitchingFunction(True),
            f.setSwitchingDistance(0.95),
        ),
        r"switching_distance: 0.95 nm is not between 0 and the cutoff, 0.9 nm",
    ),
    "diverging tail": (
        lambda s, f: (
            f.setUseDispersionCorrection(True),
            f.setUseSwitchingFunction(True),
            f.setSwitchingDistance(0.0),
        ),
        r"switching_distance: the dispersion correction diverges at 0 nm",
    ),
    "cutoff": (lambda s, f: f.setCutoffDistance(0.0), "has a cutoff of 0 nm, which must be"),
    "tolerance": (
        lambda s, f: f.setEwaldErrorTolerance(0.5),
        "has an Ewald error tolerance of 0.5, which must lie between",
    ),
    "sigma": (
        lambda s, f: f.setParticleParameters(3, 0, -0.1, 1),
        r"NonbondedForce.sigma: entry 3 is -0.1; OpenMM accepts only .* Correct the force",
    ),
    "exception": (
        lambda s, f: f.setExceptionParameters(2, 2, 9, 0, 0.1, -1),
        r"NonbondedForce.exception_epsilon: entry 2 is -1; OpenMM accepts only",
    ),
    "charge": (
        lambda s, f: f.setParticleParameters(5, math.nan, 0.1, 1),
        r"NonbondedForce.charge holds NaN or infinity at entry 5",
    ),
    "index": (
        lambda s, f: f.setExceptionParameters(0, 0, 99, 0, 1, 0),
        r"entry 0 refers to \[0, 99\], but indices reach only from 0 to 47",
    ),
    "repeated": (
        lambda s, f: f.setExceptionParameters(0, 3, 4, 0, 1, 0),
        r"particles \[3, 4\] have more than one exception",
    ),
    "self": (
        lambda s, f: f.setExceptionParameters(0, 3, 3, 0, 1, 0),
        "an exception pairs a particle with itself",
    ),
}


@pytest.mark.parametrize("name", [name for name in BAD])
def test_bad_forces(name):
    change, message = BAD[name]
    built = build(Case("PME"))
    change(built.system, built.system.getForce(0))
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(built.system)


def test_conflicting_global_defaults():
    built = build(Case("PME", offsets=True))
    other = copy.deepcopy(built.system.getForce(0))
    other.setGlobalParameterDefaultValue(0, 0.7)
    built.system.addForce(other)
    with pytest.raises(
        mdgraft.InvalidInputError, match="different defaults .* 'lambda', 0.4 and 0.7"
    ):
        mdgraft.graft(built.system)


def test_box_smaller_than_twice_the_cutoff():
    built = build(Case("PME"))
    potential = mdgraft.graft(built.system)
    with pytest.raises(mdgraft.BoxTooSmallError, match=r"cutoff of 0.9 nm needs at least 1.8 nm"):
        potential(built.x, 0.7 * built.h)
