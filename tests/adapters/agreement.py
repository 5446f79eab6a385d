"""What every Force class must pass: its graft against OpenMM's Reference platform."""

from __future__ import annotations

import mdgraft
import numpy as np
import openmm
import torch
from mdgraft.testing import (
    HostFunctions,
    Tolerances,
    check_adapter,
    check_potential,
    finite_difference,
)
from mdgraft_openmm.check import OpenMMReference


def assert_agrees(
    system,
    positions,
    box=None,
    *,
    gradients=True,
    second=True,
    consistent=True,
    rtol=1e-9,
    second_rtol=1e-6,
    force_rtol=None,
    parameter_rtol=1e-6,
    seed=0,
    **options,
):
    """Compare value, forces, box and parameter gradients and second derivatives; return the graft.

    ``force_rtol`` differs from ``rtol`` where OpenMM's forces are not the gradient of its energy;
    ``consistent`` adds `mdgraft.testing.check_potential` with the remaining options.
    """
    potential = mdgraft.graft(system)
    default = np.array([v._value for v in system.getDefaultPeriodicBoxVectors()], float)
    cell = default if box is None else np.asarray(box, float)
    host = OpenMMReference(system, np.asarray(positions, float), cell)
    sites = np.array([system.isVirtualSite(i) for i in range(system.getNumParticles())], bool)
    h = cell if potential.periodic else None
    functions = HostFunctions(
        energies=host.energies, forces=host.forces, parameter_energies=host.parameter_energies
    )
    check_adapter(
        potential,
        host.positions,
        h,
        functions,
        comparable=~sites,
        gradients=gradients,
        tolerances=Tolerances(energy=rtol, forces=force_rtol or rtol, parameters=parameter_rtol),
        seed=seed,
    )
    x = torch.tensor(host.positions)
    cell_tensor = None if h is None else torch.tensor(h)
    assert_kernels_agree(potential, x, cell_tensor)
    if second:
        # Parameter differences leave the first one with the last parameters tried.
        host = OpenMMReference(system, host.positions, cell)
        random = torch.Generator().manual_seed(seed)
        direction = torch.randn(x.shape, generator=random, dtype=torch.float64)
        direction[torch.as_tensor(sites)] = 0.0
        for name in potential.term_names:

            def term(y, name=name):
                return potential.energy_by_term(y, cell_tensor)[name].sum()

            product = torch.autograd.functional.hvp(term, x, direction)[1].numpy()

            def slope(t, name=name):
                moved = host.positions + t * direction.numpy()
                return -host.forces(moved, h, [name])[name]

            truth = finite_difference(slope, step=1e-3)
            error = np.abs(product - truth.value)[~sites]
            # Virtual sites hand their forces to their parents only in the host.
            scale = np.sqrt((product[~sites] ** 2).mean()) + np.abs(truth.value).max()
            allowed = second_rtol * scale + 3 * truth.error[~sites]
            assert (error <= allowed).all(), (
                f"{name}: Hessian product differs by {error.max():.3e}, scale {scale:.3e}"
            )
    if consistent:
        check_potential(potential, x, cell_tensor, **options)
    return potential


def assert_kernels_agree(potential, x, box=None, *, rtol=1e-9):
    """Compiled kernels and plain torch give the same energies and first derivatives."""
    names = [name for name, _ in potential.named_parameters()]
    inputs = [x.clone().requires_grad_()]
    if box is not None:
        inputs.append(box.clone().requires_grad_())
    wanted = [*inputs, *(p.requires_grad_() for p in potential.parameters())]

    def derivatives():
        energies = potential.energy_by_term(*inputs)
        return {
            name: (
                energy.detach(),
                torch.autograd.grad(energy, wanted, retain_graph=True, allow_unused=True),
            )
            for name, energy in energies.items()
        }

    compiled = derivatives()
    with mdgraft.plain_kernels():
        plain = derivatives()
    for term, (energy, slopes) in compiled.items():
        expected, references = plain[term]
        torch.testing.assert_close(energy, expected, rtol=rtol, atol=rtol)
        for name, slope, reference in zip(
            ["positions", "box"][: len(inputs)] + names, slopes, references, strict=True
        ):
            if slope is None or reference is None or reference.numel() == 0:
                continue
            scale = float(reference.abs().max())
            error = float((slope - reference).abs().max())
            assert error <= rtol * max(scale, 1e-3), f"{term}: {name} differs by {error}"


def reference_context(system):
    """A Context on the Reference platform."""
    platform = openmm.Platform.getPlatformByName("Reference")
    return openmm.Context(system, openmm.VerletIntegrator(0.001), platform)


def assert_follows_energy(system, positions, *, rtol=1e-8, energy_rtol=1e-12):
    """Forces are the gradient of OpenMM's energy, where its own forces are not."""
    context = reference_context(system)
    potential = mdgraft.graft(system)
    box = np.array([v._value for v in system.getDefaultPeriodicBoxVectors()], float)
    direction = np.random.default_rng(6).normal(size=positions.shape)

    def energy(t):
        context.setPositions(positions + t * direction)
        return context.getState(energy=True).getPotentialEnergy()._value

    truth = finite_difference(energy, step=1e-3)
    x, h = torch.tensor(positions), torch.tensor(box) if potential.periodic else None
    with torch.no_grad():
        work = -(potential.forces(x, h).numpy() * direction).sum()
        found = potential(x, h).item()
    assert abs(found - energy(0)) <= energy_rtol * abs(energy(0))
    assert abs(work - truth.value) < rtol * abs(truth.value) + 3 * truth.error
