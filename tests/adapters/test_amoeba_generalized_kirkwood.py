"""AmoebaGeneralizedKirkwoodForce, with its AmoebaMultipoleForce, against OpenMM's Reference."""

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees, assert_follows_energy, reference_context
from mdgraft.testing import finite_difference
from test_amoeba_multipole import N, molecules

Solvent = openmm.AmoebaGeneralizedKirkwoodForce


def solvated(
    *,
    radii=(0.12, 0.2),
    tanh=False,
    descreen=False,
    offset=0.0,
    cavity=True,
    first=False,
    **options,
):
    """Three molecules of four atoms each in a solvent."""
    system, positions = molecules(**options)
    rng, force = np.random.default_rng(7), Solvent()
    force.setSolventDielectric(20.0)
    force.setSoluteDielectric(1.0)
    force.setIncludeCavityTerm(cavity)
    force.setTanhRescaling(tanh)
    force.setDescreenOffset(offset)
    for i in range(N):
        charge = system.getForce(0).getMultipoleParameters(i)[0]
        radius = rng.uniform(*radii)
        own = rng.uniform(*radii) if descreen else radius
        force.addParticle(charge, radius, rng.uniform(0.6, 0.9), own, 0.0)
    if first:
        # The order of the two must not matter.
        multipoles = openmm.XmlSerializer.clone(system.getForce(0))
        system.removeForce(0)
        system.addForce(force)
        system.addForce(multipoles)
    else:
        system.addForce(force)
    return system, positions


OPTIONS = [
    dict(polarization="direct"),
    dict(polarization="mutual"),
    dict(polarization="direct", tanh=True, descreen=True, offset=0.01),
    dict(polarization="direct", radii=(0.02, 0.5), cavity=False),
    dict(polarization="direct", moments=False, zero=(0, 3), first=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees(options):
    """Energy, forces, all parameters of both forces, and second derivatives."""
    system, positions = solvated(**options)
    potential = assert_agrees(
        system, positions, second_rtol=1e-5, gradients=False, translation_rtol=None
    )
    assert set(potential.routes.values()) == {"native"}
    names = [n for n, p in potential.named_parameters() if p.numel()]
    slopes = dict(
        zip(
            names,
            torch.autograd.grad(
                potential(torch.tensor(positions)),
                [potential.get_parameter(name) for name in names],
            ),
            strict=True,
        )
    )
    rng = np.random.default_rng(4)
    for name, slope in slopes.items():
        parameter = potential.get_parameter(name)
        base = parameter.detach().clone()
        direction = torch.tensor(rng.uniform(0.5, 1.0, size=base.shape)) * base

        def energy(t, parameter=parameter, base=base, direction=direction):
            with torch.no_grad():
                parameter.copy_(base + t * direction)
            mdgraft_openmm.write_parameters(potential, system)
            context = reference_context(system)
            context.setPositions(positions)
            return context.getState(energy=True).getPotentialEnergy()._value

        truth = finite_difference(energy, step=1e-3)
        with torch.no_grad():
            parameter.copy_(base)
        found = (slope * direction).sum().item()
        scale = (slope * direction).norm().item()
        assert abs(found - truth.value) <= 1e-6 * scale + 3 * truth.error + 1e-9, name


def test_extrapolated_polarization():
    """The gradient of OpenMM's energy, which its forces are not."""
    system, positions = solvated(polarization="extrapolated")
    assert_follows_energy(system, positions)


def test_routes():
    """Both go the same way, and by the host their parameters have derivatives as well."""
    # The larger one of two radii counts, and where they are equal differences are poor.
    system, positions = solvated(polarization="direct", descreen=True)
    x = torch.tensor(positions)
    native = mdgraft.graft(system)
    for route in ("host", {"AmoebaGeneralizedKirkwoodForce": "host"}):
        host = mdgraft.graft(system, route=route)
        assert set(host.routes.values()) == {"host"}
    host.freeze("*.quadrupole", "*.dipole")
    assert host(x).item() == pytest.approx(native(x).item(), rel=1e-12)
    names = ("AmoebaMultipoleForce.charge", "AmoebaGeneralizedKirkwoodForce.radius")
    names += ("AmoebaGeneralizedKirkwoodForce.solvent_dielectric",)
    answers = []
    for potential in (native, host):
        parameters = [potential.get_parameter(name) for name in names]
        answers.append(torch.autograd.grad(potential(x), parameters))
    for found, truth in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-6 * truth.abs().max().item())


def test_neck_factors_go_to_the_host():
    system, positions = solvated(polarization="direct")
    force = system.getForce(1)
    for i in range(N):
        force.setParticleParameters(i, *force.getParticleParameters(i)[:4], 0.5)
    potential = mdgraft.graft(system)
    assert set(potential.routes.values()) == {"host"}
    context = reference_context(system)
    context.setPositions(positions)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert potential(torch.tensor(positions)).item() == pytest.approx(energy, rel=1e-12)


def test_write_back():
    """The charges of both forces stay equal, or no Context would take them."""
    system, positions = solvated(polarization="direct")
    before = openmm.XmlSerializer.serialize(system)
    potential = mdgraft.graft(system)
    mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before
    context = reference_context(system)
    context.setPositions(positions)
    with torch.no_grad():
        for name in ("AmoebaMultipoleForce.charge", "AmoebaGeneralizedKirkwoodForce.radius"):
            potential.get_parameter(name).mul_(1.05)
    x = torch.tensor(positions)
    mdgraft_openmm.write_parameters(potential, context)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert potential(x).item() == pytest.approx(energy, rel=1e-12)
    with torch.no_grad():
        potential.get_parameter("AmoebaGeneralizedKirkwoodForce.probe_radius").mul_(1.05)
    with pytest.raises(mdgraft.ParameterMismatchError, match="probe_radius"):
        mdgraft_openmm.write_parameters(potential, context)
    mdgraft_openmm.write_parameters(potential, system)
    context = reference_context(system)
    context.setPositions(positions)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert potential(x).item() == pytest.approx(energy, rel=1e-12)


def with_mesh(system):
    system.getForce(0).setNonbondedMethod(openmm.AmoebaMultipoleForce.PME)
    system.getForce(0).setCutoffDistance(0.5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.removeForce(0), "needs an AmoebaMultipoleForce"),
        (with_mesh, "needs an AmoebaMultipoleForce without a cutoff"),
        (lambda s: s.getForce(1).addParticle(0, 0.1, 0.8), "has 13 particles"),
        (
            lambda s: s.getForce(1).setParticleParameters(2, 9.0, 0.1, 0.8, 0.1, 0.0),
            "charges are not those of the multipoles",
        ),
    ],
)
def test_what_is_refused(change, match):
    system, _ = solvated()
    change(system)
    with pytest.raises(mdgraft.InvalidInputError, match=match):
        mdgraft.graft(system)
