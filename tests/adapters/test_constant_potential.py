"""ConstantPotentialForce against OpenMM's Reference platform."""

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees, reference_context

Conp = openmm.ConstantPotentialForce
BOX = np.diag([1.7, 1.8, 2.4])
TRICLINIC = np.array([[1.7, 0.0, 0.0], [0.3, 1.8, 0.0], [-0.2, 0.4, 2.4]])


def capacitor(
    *, box=BOX, matrix=True, exceptions=((0, 1, 0.0), (2, 3, 0.3)), target=None, field=None,
    thomas_fermi=(0.0, 1.5), layers=2, periodic_exceptions=False, net=0.0, n_ions=6,
):  # fmt: skip
    """Ions between two layers of four electrode particles each."""
    rng = np.random.default_rng(11)
    system, force = openmm.System(), Conp()
    system.setDefaultPeriodicBoxVectors(*box)
    positions = rng.uniform([0, 0, 0.5], [1.6, 1.6, 1.9], (n_ions, 3))
    for _ in range(n_ions):
        system.addParticle(1.0)
        force.addParticle(rng.normal() + net)
    for layer in range(layers):
        members = []
        for k in range(4):
            members.append(system.addParticle(0.0))
            force.addParticle(0.3)
            z = (0.1, 2.2)[layer] + 0.05 * rng.normal()
            positions = np.append(positions, [[0.1 + 0.8 * (k % 2), 0.2 + 0.9 * (k // 2), z]], 0)
        force.addElectrode(members, rng.normal(0, 50), rng.uniform(0.05, 0.12), thomas_fermi[layer])
    for i, j, product in exceptions:
        force.addException(i, j, product)
    force.setCutoffDistance(0.8)
    force.setPMEParameters(3.5, 10, 12, 15)
    force.setConstantPotentialMethod(Conp.Matrix if matrix else Conp.CG)
    force.setCGErrorTolerance(1e-9)
    force.setExceptionsUsePeriodicBoundaryConditions(periodic_exceptions)
    if target is not None:
        force.setUseChargeConstraint(True)
        force.setChargeConstraintTarget(target)
    if field is not None:
        force.setExternalField(openmm.Vec3(*field))
    system.addForce(force)
    return system, positions


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(target=0.4, net=0.2),
        dict(box=TRICLINIC, target=0.0, field=(20.0, 0.0, 10.0), periodic_exceptions=True),
        dict(matrix=False, target=0.1),
        dict(matrix=False, field=(14.4, 0.0, 5.1), layers=1, net=0.3),
        dict(layers=0, net=0.1),
        dict(exceptions=()),
    ],
)
def test_agrees(options):
    """Energy, forces, box, parameters and second derivatives, in every variant.

    Fields are at right angles to the lattice translation that the checks try, since they tell
    images apart; no mesh is invariant to other translations.
    """
    system, positions = capacitor(**options)
    assert_agrees(system, positions, translation_rtol=None)


@pytest.mark.parametrize("options", [dict(), dict(target=0.4, box=TRICLINIC, field=(1, 2, 3))])
def test_charges(options):
    """Solved charges and their derivatives, in batches too."""
    system, positions = capacitor(matrix=False, **options)
    force, context = system.getForce(0), reference_context(system)
    potential = mdgraft.graft(system)
    term = potential.term("ConstantPotentialForce")
    box = torch.tensor(options.get("box", BOX))[None]
    values = {k: v.detach() for k, v in term.parameter_values().items()}

    def host(x):
        context.setPositions(x)
        return np.array([float(getattr(q, "_value", q)) for q in force.getCharges(context)])

    x = torch.tensor(positions)[None]
    charges = term.charges(x, box, values)
    np.testing.assert_allclose(charges[0], host(positions), rtol=1e-9, atol=1e-11)
    if "target" in options:
        assert charges.sum().item() == pytest.approx(options["target"], abs=1e-12)
    batch = torch.cat([x, x + 0.01 * torch.arange(x.numel()).reshape(x.shape) / x.numel()])
    both = term.charges(batch, box.expand(2, 3, 3), values)
    torch.testing.assert_close(both[:1], charges)
    step = np.random.default_rng(0).normal(size=positions.shape)
    tangent = torch.tensor(step)[None]
    _, slope = torch.func.jvp(lambda y: term.charges(y, box, values), (x,), (tangent,))
    difference = (host(positions + 1e-4 * step) - host(positions - 1e-4 * step)) / 2e-4
    np.testing.assert_allclose(slope[0], difference, rtol=1e-5, atol=1e-5)


def test_at_the_minimum():
    """No other charges have a lower energy."""
    system, positions = capacitor()
    potential = mdgraft.graft(system)
    term = potential.term("ConstantPotentialForce")
    x, box = torch.tensor(positions)[None], torch.tensor(BOX)[None]
    values = {k: v.detach() for k, v in term.parameter_values().items()}
    geometry = term._geometry(x, box, values)
    solved = term._relaxed(geometry)
    lowest = term._energy(solved, geometry)
    matrix = torch.func.hessian(lambda q: term._energy(q, geometry).sum())(solved)[0, :, 0]
    torch.testing.assert_close(matrix, term._matrix(geometry)[0], rtol=1e-9, atol=1e-8)
    for seed in range(5):
        step = 0.01 * torch.randn(solved.shape, generator=torch.Generator().manual_seed(seed))
        higher = term._energy(solved + step, geometry)
        expected = 0.5 * step[0].double() @ matrix @ step[0].double()
        torch.testing.assert_close(higher - lowest, expected[None], rtol=1e-6, atol=1e-9)
        assert higher > lowest


@pytest.mark.parametrize("target", [None, 0.3])
def test_hessians_under_vmap(target):
    system, positions = capacitor(target=target)
    potential, box = mdgraft.graft(system), torch.tensor(BOX)

    def hessian(x):
        return torch.func.hessian(lambda y: potential(y, box))(x)

    frames = torch.tensor(np.stack([positions, positions + 0.02 * np.sin(positions)]))
    single = torch.stack([hessian(x) for x in frames])
    torch.testing.assert_close(torch.func.vmap(hessian)(frames), single)


def test_no_minimum():
    """Electrode particles that overlap too much attract their own charges without limit."""
    system, positions = capacitor(layers=1, thomas_fermi=(0.0, 0.0))
    system.getForce(0).setElectrodeParameters(0, [6, 7, 8, 9], 1.0, 3.0, 0.0)
    context = reference_context(system)
    context.setPositions(positions)
    with pytest.raises(openmm.OpenMMException, match="positive definite"):
        context.getState(energy=True)
    with pytest.raises(mdgraft.InvalidInputError, match="no minimum in"):
        mdgraft.graft(system)(torch.tensor(positions), torch.tensor(BOX))


def test_mesh_from_the_tolerance():
    """Alpha and grid follow from the tolerance, or come from the Context."""
    system, _ = capacitor()
    force = system.getForce(0)
    force.setPMEParameters(0, 0, 0, 0)
    force.setEwaldErrorTolerance(1e-3)
    context = reference_context(system)
    alpha, *grid = force.getPMEParametersInContext(context)
    for host in (system, context):
        settings = mdgraft.graft(host).term("ConstantPotentialForce").settings
        assert settings.alpha == pytest.approx(float(getattr(alpha, "_value", alpha)), rel=1e-14)
        assert settings.grid == tuple(grid)


def test_write_back():
    """New values reach the System and a live Context."""
    system, positions = capacitor(target=0.2, field=(1.0, 2.0, 3.0))
    context = reference_context(system)
    context.setPositions(positions)
    context.getState(energy=True)
    potential = mdgraft.graft(context)
    with torch.no_grad():
        for value in potential.parameters():
            value.mul_(1.05)
    mdgraft_openmm.write_parameters(potential, context)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    x, box = torch.tensor(positions), torch.tensor(BOX)
    assert potential(x, box).item() == pytest.approx(energy, rel=1e-10)
    with torch.no_grad():
        name = "ConstantPotentialForce.exception_charge_product"
        dict(potential.named_parameters())[name][0] = 0.2
    with pytest.raises(mdgraft.ParameterMismatchError, match="exception 0"):
        mdgraft_openmm.write_parameters(potential, context)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s, f: f.addParticle(0.1), "has 15 particles, the System 14"),
        (lambda s, f: f.addElectrode([6], 0.0, 0.1, 0.0), "belongs to electrodes 0 and 2"),
        (lambda s, f: f.addException(0, 7, 0.0), "can have no exceptions"),
        (lambda s, f: f.setCutoffDistance(0.9), "at most half"),
        (lambda s, f: s.setParticleMass(8, 1.0), "needs electrode particles without mass"),
        (lambda s, f: f.setElectrodeParameters(1, [10], 0.0, -0.1, 0.0), "gaussian_width: entry 1"),
        (lambda s, f: f.setElectrodeParameters(1, [10], 0.0, 0.1, -1.0), "thomas_fermi_scale"),
        (
            lambda s, f: [
                f.setUseChargeConstraint(True),
                *(f.setElectrodeParameters(i, [], 0.0, 0.1, 0.0) for i in (0, 1)),
            ],
            "no electrode particles",
        ),
    ],
)
def test_refuses_what_openmm_refuses(spoil, message):
    """Counts, indices, cutoffs, masses and electrodes."""
    system, _ = capacitor()
    spoil(system, system.getForce(0))
    with pytest.raises(openmm.OpenMMException):
        reference_context(system)
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(system)
