"""AmoebaVdwForce against OpenMM's Reference platform."""

import itertools
import pathlib

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees, reference_context
from mdgraft.potentials.amoeba.vdw import EPSILON_RULES, SIGMA_RULES

Vdw = openmm.AmoebaVdwForce
BOX = np.diag([1.9, 2.0, 2.1])
TRICLINIC = np.array([[1.9, 0.0, 0.0], [0.3, 2.0, 0.0], [-0.4, 0.5, 2.1]])


def vdw_system(
    *, by_type=False, cutoff=None, box=BOX, correction=True, overrides=(), zero=False, **options
):
    """Twelve particles on a jittered lattice, every third a parent of the next two."""
    rng = np.random.default_rng(7)
    system, force = openmm.System(), Vdw()
    system.setDefaultPeriodicBoxVectors(*box)
    kinds = [(rng.uniform(0.12, 0.2), rng.uniform(0.2, 1.0)) for _ in range(3)]
    if zero:
        kinds[1] = (0.0 if zero == "sigma" else kinds[1][0], 0.0)
    if by_type:
        for kind in kinds:
            force.addParticleType(*kind)
        for first, second in overrides:
            force.addTypePair(first, second, rng.uniform(0.25, 0.4), rng.uniform(0.2, 1.0))
    for i in range(12):
        system.addParticle(1.0)
        parent, reduction = (i, 0.0) if i % 3 == 0 else (i - i % 3, rng.uniform(0.8, 0.95))
        tail = (i % 4 == 1, rng.uniform(0.7, 1.2))
        if by_type:
            force.addParticle(parent, i % 3, reduction, *tail)
        else:
            force.addParticle(parent, *kinds[i % 3], reduction, *tail)
    for i in range(12):
        force.setParticleExclusions(i, [j for j in range(12) if j // 3 == i // 3])
    if cutoff is not None:
        force.setNonbondedMethod(Vdw.CutoffPeriodic)
        force.setCutoffDistance(cutoff)
        force.setUseDispersionCorrection(correction)
    for key, value in options.items():
        getattr(force, f"set{key}")(value)
    system.addForce(force)
    lattice = np.array(list(itertools.product(range(2), range(2), range(3))), float)
    positions = 0.34 * lattice + rng.uniform(-0.04, 0.04, (12, 3))
    return system, positions + np.array([1.5, 0.0, -1.0])


OPTIONS = [
    dict(),
    dict(PotentialFunction=Vdw.LennardJones),
    dict(cutoff=0.8),
    dict(cutoff=0.6, box=TRICLINIC, correction=False),
    dict(cutoff=0.7, PotentialFunction=Vdw.LennardJones, box=TRICLINIC),
    dict(by_type=True),
    dict(by_type=True, overrides=[(0, 1), (2, 2), (1, 0)]),
    dict(by_type=True, overrides=[(0, 1), (2, 2)], cutoff=0.8),
    dict(AlchemicalMethod=Vdw.Decouple),
    dict(AlchemicalMethod=Vdw.Annihilate, SoftcorePower=3, SoftcoreAlpha=0.4, cutoff=0.7),
    dict(AlchemicalMethod=Vdw.Decouple, by_type=True, PotentialFunction=Vdw.LennardJones),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_agrees(options):
    """Energy, forces, box, parameters and second derivatives, in every variant."""
    system, positions = vdw_system(**options)
    potential = assert_agrees(system, positions)
    assert potential.term("AmoebaVdwForce").by_type == options.get("by_type", False)


@pytest.mark.parametrize("rules", list(itertools.product(SIGMA_RULES, EPSILON_RULES)))
@pytest.mark.parametrize("zero", [False, True])
def test_combining_rules(rules, zero):
    """All rules, also where a well depth is zero."""
    system, positions = vdw_system(
        SigmaCombiningRule=rules[0], EpsilonCombiningRule=rules[1], zero=zero
    )
    # Where a depth is zero its derivative may be infinite, and is taken as zero.
    assert_agrees(
        system,
        positions,
        gradients=not zero,
        second=False,
        consistent=rules in (("CUBIC-MEAN", "HHG"), ("GEOMETRIC", "W-H")),
    )


def test_zero_radius():
    """Lennard-Jones allows a radius of zero, in every rule."""
    for rules in itertools.product(SIGMA_RULES, EPSILON_RULES):
        system, positions = vdw_system(
            SigmaCombiningRule=rules[0],
            EpsilonCombiningRule=rules[1],
            PotentialFunction=Vdw.LennardJones,
            zero="sigma",
        )
        potential = assert_agrees(
            system, positions, gradients=False, second=False, consistent=False
        )
        energy = potential(torch.tensor(positions)).sum()
        for gradient in torch.autograd.grad(energy, list(potential.parameters())):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("coupling", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("method", [Vdw.Decouple, Vdw.Annihilate])
def test_coupling(coupling, method):
    """The global parameter and its derivative, also at the ends."""
    system, positions = vdw_system(AlchemicalMethod=method)
    context = reference_context(system)
    context.setPositions(positions)
    context.setParameter(Vdw.Lambda(), coupling)
    potential = mdgraft.graft(context)
    x = torch.tensor(positions)

    def host(value):
        context.setParameter(Vdw.Lambda(), value)
        return context.getState(energy=True).getPotentialEnergy()._value

    energy = potential(x)
    assert energy.item() == pytest.approx(host(coupling), rel=1e-12)
    parameter = dict(potential.named_parameters())[f"globals.{Vdw.Lambda()}"]
    (slope,) = torch.autograd.grad(energy.sum(), parameter)
    expected = (host(coupling + 1e-5) - host(coupling - 1e-5)) / 2e-5
    assert slope.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    forces = potential.forces(x).detach().numpy()
    context.setParameter(Vdw.Lambda(), coupling)
    truth = context.getState(forces=True).getForces(asNumpy=True)._value
    np.testing.assert_allclose(forces, truth, rtol=1e-9, atol=1e-9)


def test_site_beyond_the_cutoff():
    """Particles decide what is within the cutoff, sites the energy and its taper."""
    system, positions = vdw_system(cutoff=0.6)
    force = system.getForce(0)
    for i in (1, 4):
        force.setParticleParameters(i, i - 1, 0.2, 0.7, 1.4)
    positions[4] = positions[1] + np.array([0.0, 0.0, 0.599])
    positions[0] = positions[1] + np.array([0.0, 0.02, 0.1])
    positions[3] = positions[4] - np.array([0.0, 0.03, 0.1])
    context = reference_context(system)
    context.setPositions(positions)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    potential = mdgraft.graft(system)
    x, box = torch.tensor(positions), torch.tensor(BOX)
    assert potential(x, box).item() == pytest.approx(energy, rel=1e-11)


@pytest.mark.parametrize("cutoff", [None, 0.8])
def test_one_sided_exclusions(cutoff):
    """An exclusion given for one particle only counts as it does in OpenMM."""
    system, positions = vdw_system(cutoff=cutoff)
    force = system.getForce(0)
    force.setParticleExclusions(0, [4])
    force.setParticleExclusions(7, [5, 11])
    force.setParticleExclusions(9, [3])
    potential = assert_agrees(system, positions, gradients=False, second=False, consistent=False)
    kept = potential.term("AmoebaVdwForce").excluded
    assert kept.numel() == 12 + 2


def test_second_derivatives_of_the_correction():
    """The tail's Hessian in sigma and epsilon, although equal particles share their integrals."""
    system, _ = vdw_system(cutoff=0.8)
    system.getForce(0).setCutoffDistance(0.4)
    potential = mdgraft.graft(system)
    term = potential.term("AmoebaVdwForce")
    values = {k: v.detach() for k, v in term.parameter_values().items()}
    random = torch.Generator().manual_seed(3)
    step = {
        k: 0.1 * torch.randn(12, generator=random, dtype=torch.float64) * values[k]
        for k in ("sigma", "epsilon")
    }

    def tail(t):
        return term._tail({k: values[k] + t * step[k] for k in step})

    zero = torch.tensor(0.0, dtype=torch.float64)
    first, second = torch.func.grad(tail), torch.func.grad(torch.func.grad(tail))
    h = 1e-4
    slope = (tail(zero + h) - tail(zero - h)) / (2 * h)
    torch.testing.assert_close(first(zero), slope, rtol=1e-6, atol=0)
    curvature = (first(zero + h) - first(zero - h)) / (2 * h)
    torch.testing.assert_close(second(zero), curvature, rtol=1e-6, atol=0)
    batch = torch.func.vmap(tail)(torch.stack([zero, zero + 0.1]))
    torch.testing.assert_close(batch, torch.stack([tail(zero), tail(zero + 0.1)]))


def test_types_without_particles():
    """Force fields list many types; only those of particles are in the correction."""
    system, positions = vdw_system(by_type=True, cutoff=0.8)
    for _ in range(100):
        system.getForce(0).addParticleType(0.15, 0.5)
    potential = assert_agrees(system, positions, second=False, consistent=False)
    assert len(potential.term("AmoebaVdwForce").tail_pairs) == 6


def test_write_back():
    """A live Context takes over what it can, and the rest is refused by name."""
    system, positions = vdw_system(cutoff=0.8, correction=False)
    potential = mdgraft.graft(system)
    with torch.no_grad():
        for value in potential.term("AmoebaVdwForce").parameters():
            value.mul_(1.03)
    context = reference_context(system)
    context.setPositions(positions)
    mdgraft_openmm.write_parameters(potential, context)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    x, box = torch.tensor(positions), torch.tensor(BOX)
    assert potential(x, box).item() == pytest.approx(energy, rel=1e-10)

    system, _ = vdw_system(cutoff=0.8)
    with pytest.raises(mdgraft.ParameterMismatchError, match="dispersion correction"):
        mdgraft_openmm.write_parameters(potential, reference_context(system))
    mdgraft_openmm.write_parameters(potential, system)
    with torch.no_grad():
        dict(potential.named_parameters())[f"globals.{Vdw.Lambda()}"].fill_(0.5)
    with pytest.raises(mdgraft.ParameterMismatchError, match="AmoebaVdwLambda"):
        mdgraft_openmm.write_parameters(potential, system)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.addParticle(0, 0.1, 0.1, 0.0), "has 13 particles, the System 12"),
        (lambda f: f.setParticleParameters(0, 0, -0.1, 0.1, 0.0), "entry 0 is -0.1 nm"),
        (lambda f: f.setParticleParameters(0, 0, 0.0, 0.1, 0.0), "are positive"),
        (lambda f: f.setSigmaCombiningRule("MEAN"), "combining rule 'MEAN'"),
        (lambda f: f.setEpsilonCombiningRule("MEAN"), "combining rule 'MEAN'"),
        (
            lambda f: [f.setNonbondedMethod(Vdw.CutoffPeriodic), f.setCutoffDistance(0.96)],
            "at most half",
        ),
    ],
)
def test_refuses_what_openmm_refuses(spoil, message):
    """Counts, radii, rules and cutoffs."""
    system, _ = vdw_system()
    spoil(system.getForce(0))
    with pytest.raises(openmm.OpenMMException):
        reference_context(system)
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(system)


def test_parent_out_of_range():
    """OpenMM would read beyond its arrays."""
    system, _ = vdw_system()
    system.getForce(0).setParticleParameters(2, 12, 0.2, 0.1, 0.9)
    with pytest.raises(mdgraft.InvalidInputError, match="entry 2 refers to"):
        mdgraft.graft(system)


def test_amoeba_water():
    """A box of water with the AMOEBA force field's own set-up."""
    from openmm import app

    pdb = app.PDBFile(str(pathlib.Path(app.__file__).parent / "data" / "tip3p.pdb"))
    field = app.ForceField("amoeba2018.xml")
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.delete([residue for residue in pdb.topology.residues() if residue.index >= 40])
    full = field.createSystem(
        modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.7, vdwCutoff=0.75
    )
    for i in reversed(range(full.getNumForces())):
        if not isinstance(full.getForce(i), Vdw):
            full.removeForce(i)
    positions = np.array(modeller.positions._value)
    assert_agrees(full, positions, gradients=False, second=False, consistent=False)
