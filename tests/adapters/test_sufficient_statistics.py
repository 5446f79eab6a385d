"""Statistics of frames of whole systems: water, a molecule, virtual sites, a host's own terms."""

import mdgraft
import openmm
import pytest
import torch
from mdgraft import Frames, InvalidInputError
from mdgraft.ensembles.sufficient_statistics import SufficientStatistics
from openmm import app, unit
from torch.func import functional_call


def frames_of(positions, box, n_frames=4, size=0.002, group=1):
    """Frames around given positions; groups of so many particles move together."""
    x = torch.tensor(positions.value_in_unit(unit.nanometer), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shape = (n_frames, len(x) // group, 1, 3)
    shift = size * torch.randn(shape, generator=generator, dtype=torch.float64)
    moved = (x.reshape(1, -1, group, 3) + shift).reshape(n_frames, -1, 3)
    if box is None:
        return Frames(positions=moved)
    cell = torch.tensor(box.value_in_unit(unit.nanometer), dtype=torch.float64)
    return Frames(positions=moved, box=cell.expand(n_frames, 3, 3).clone())


def water_box(model, n_molecules=216, **options):
    """A box of rigid water by its name in OpenMM, with frames in which molecules have moved."""
    field = app.ForceField(f"{model}.xml")
    modeller = app.Modeller(app.Topology(), [])
    modeller.addSolvent(field, model=model, numAdded=n_molecules)
    system = field.createSystem(modeller.topology, nonbondedCutoff=0.7 * unit.nanometer, **options)
    sites = system.getNumParticles() // n_molecules
    box = modeller.topology.getPeriodicBoxVectors()
    return system, frames_of(modeller.positions, box, size=0.01, group=sites), sites


def assert_same_function(statistics, potential, frames, factor=0.05):
    values = {}
    for k, name in enumerate(statistics.names):
        value = potential.get_parameter(name).detach()
        values[name] = value * (1 + factor * (-1) ** k * (1 + 0.3 * k))
    arguments = (frames.positions, frames.box) if potential.periodic else (frames.positions,)

    def energies(values):
        return functional_call(potential, values, arguments)

    exact = energies(values).detach()
    found = statistics.energies(values)
    assert (exact - statistics.generating_energies).abs().max() > 1e-5 * exact.abs().max()
    assert (found - exact).abs().max() < 1e-10 * exact.abs().max()
    jacobian = torch.func.jacrev(energies)(values)
    own = torch.func.jacrev(statistics.energies)(values)
    for name in statistics.names:
        scale = jacobian[name].abs().max()
        assert (own[name] - jacobian[name]).abs().max() < 1e-10 * scale, name


def tie_water(potential, sites):
    place = torch.arange(potential.n_particles) % sites
    charged = 3 if sites == 4 else 0
    # Neutral molecules: the charge of the hydrogens follows from one number.
    hydrogen = (place == 1) | (place == 2)
    factors = torch.where(place == charged, 1.0, -0.5).double()[hydrogen | (place == charged)]
    q = potential.values()["NonbondedForce.charge"][charged].item()
    members = {"NonbondedForce.charge": (hydrogen | (place == charged), factors)}
    potential.tie("charge", members, value=q)
    potential.tie("sigma", {"NonbondedForce.sigma": place == 0})
    potential.tie("epsilon", {"NonbondedForce.epsilon": place == 0})
    return ["tied.charge", "tied.sigma", "tied.epsilon"]


@pytest.mark.parametrize("model", ["tip3p", "tip4pew"])
def test_water_with_a_mesh(model):
    """Charge, sigma and epsilon; the fourth site of a model is a virtual one."""
    system, frames, sites = water_box(model, nonbondedMethod=app.PME)
    potential = mdgraft.graft(system)
    names = tie_water(potential, sites)
    statistics = SufficientStatistics.collect(potential, frames, names)
    assert_same_function(statistics, potential, frames)


def test_flexible_water():
    """Force constants beside charges, and a length instead of its force constant."""
    system, frames, sites = water_box(
        "tip3p", nonbondedMethod=app.PME, rigidWater=False, n_molecules=125
    )
    potential = mdgraft.graft(system)
    names = tie_water(potential, sites)
    for term, key in (("HarmonicBondForce", "k"), ("HarmonicAngleForce", "k")):
        potential.tie(f"{term}_{key}", {f"{term}.{key}": None})
        names.append(f"tied.{term}_{key}")
    statistics = SufficientStatistics.collect(potential, frames, names)
    assert_same_function(statistics, potential, frames)
    potential.tie("length", {"HarmonicBondForce.length": None})
    with pytest.raises(InvalidInputError, match=r"'tied\.HarmonicBondForce_k', 'tied\.length'"):
        SufficientStatistics.collect(potential, frames, [*names, "tied.length"])


def small_molecule():
    """A chain of six particles with every bonded force and scaled 1-4 interactions."""
    system = openmm.System()
    for _ in range(6):
        system.addParticle(12.0)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    torsions, series = openmm.PeriodicTorsionForce(), openmm.RBTorsionForce()
    nonbonded = openmm.NonbondedForce()
    for i in range(5):
        bonds.addBond(i, i + 1, 0.15, 2.0e5)
    for i in range(4):
        angles.addAngle(i, i + 1, i + 2, 1.95, 400.0)
    for i in range(3):
        torsions.addTorsion(i, i + 1, i + 2, i + 3, 3, 0.0, 1.2)
        torsions.addTorsion(i, i + 1, i + 2, i + 3, 1, 0.3, 0.7)
        series.addTorsion(i, i + 1, i + 2, i + 3, 0.5, -0.3, 0.2, 0.7, -0.1, 0.4)
    for i in range(6):
        nonbonded.addParticle(0.2 * (-1) ** i, 0.33 + 0.02 * (i % 2), 0.4)
    nonbonded.createExceptionsFromBonds([(i, i + 1) for i in range(5)], 0.83, 0.5)
    for force in (bonds, angles, torsions, series, nonbonded):
        system.addForce(force)
    x = [(0.12 * i, 0.09 * (i % 2), 0.02 * i * (i % 3)) for i in range(6)]
    return system, unit.Quantity(x, unit.nanometer)


def molecule(**options):
    system, positions = small_molecule()
    potential = mdgraft.graft(system, **options)
    return potential, frames_of(positions, None, n_frames=8, size=0.01)


def tie_molecule(potential):
    names = []
    for label, name, selection in (
        ("bond", "HarmonicBondForce.k", None),
        ("angle", "HarmonicAngleForce.k", None),
        ("threefold", "PeriodicTorsionForce.k", [0, 2, 4]),
        ("onefold", "PeriodicTorsionForce.k", [1, 3, 5]),
        ("c2", "RBTorsionForce.c2", None),
        ("sigma", "NonbondedForce.sigma", [0, 2, 4]),
    ):
        potential.tie(label, {name: selection})
        names.append(f"tied.{label}")
    own = potential.values()["NonbondedForce.exception_epsilon"] != 0
    potential.tie(
        "epsilon",
        {
            "NonbondedForce.epsilon": None,
            "NonbondedForce.exception_epsilon": (own, 0.5),
        },
    )
    return [*names, "tied.epsilon", "NonbondedForce.charge"]


def test_molecule():
    """Force constants, amplitudes, 1-4 interactions that follow epsilon, and every charge."""
    potential, frames = molecule()
    statistics = SufficientStatistics.collect(potential, frames, tie_molecule(potential))
    assert_same_function(statistics, potential, frames)
    potential.tie("phase", {"PeriodicTorsionForce.phase": [1, 3, 5]})
    names = ["tied.phase", "HarmonicAngleForce.angle"]
    with pytest.raises(InvalidInputError, match=r"nor quadratic in \['tied\.phase'\]"):
        SufficientStatistics.collect(potential, frames, names)


def test_terms_of_the_host():
    """Polynomials need nothing but energies and slopes; sigma and epsilon need the native route."""
    native, _ = molecule()
    potential, frames = molecule(route={"NonbondedForce": "host"})
    frames = frames[:3]
    for each in (potential, native):
        each.tie("charge", {"NonbondedForce.charge": [0, 2, 4]})
        each.tie("sigma", {"NonbondedForce.sigma": [0, 2, 4]})
        own = each.values()["NonbondedForce.exception_epsilon"] != 0
        each.tie("scaled", {"NonbondedForce.exception_epsilon": own})
    names = ["tied.charge", "tied.scaled", "HarmonicBondForce.k"]
    statistics = SufficientStatistics.collect(potential, frames, names)
    values = {name: 1.1 * potential.get_parameter(name).detach() for name in names}
    exact = functional_call(native, values, (frames.positions,))
    torch.testing.assert_close(statistics.energies(values), exact, rtol=1e-8, atol=1e-7)
    with pytest.raises(InvalidInputError, match=r"\['tied\.sigma'\].*natively"):
        SufficientStatistics.collect(potential, frames, [*names, "tied.sigma"])
