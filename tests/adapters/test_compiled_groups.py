"""Interaction groups in compiled loops over pairs: against OpenMM and plain torch."""

import mdgraft
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_kernels_agree
from mdgraft.kernels.fused import thinning

N = 216
BOX = np.array([[2.7, 0, 0], [0.4, 2.7, 0], [-0.3, 0.5, 2.7]])
HALF = list(range(0, N, 2))
#: Sets of particles of each group.
GROUPS = {
    "a few with the rest": [(range(5), range(5, N))],
    "within a set": [(HALF, HALF)],
    "sets that overlap": [(range(40), range(20, 90))],
    "several, some pairs twice": [
        (range(10), range(N)),
        (range(5, 30), HALF),
        ([200, 3, 77], [3, 77, 9]),
    ],
    "more kinds than bits": [(range(3 * k, 3 * k + 7), range(2 * k, N, 3)) for k in range(70)],
    "none at all": [([0], [0])],
}
ENERGIES = {
    "symmetric": "0.5*lambda*(s1+s2)/(r+0.3)^3",
    "not symmetric": "lambda*s1*exp(-3*r) - s2^2*r",
    "singular": "4*((0.5*(s1+s2)/r)^12-(0.5*(s1+s2)/r)^6)*1e-3",
    "with a table": "t(2*s1+1, 3)*r + s2",
}
METHODS = ["NoCutoff", "CutoffNonPeriodic", "CutoffPeriodic"]
each_energy = pytest.mark.parametrize("energy", ENERGIES)
each_group = pytest.mark.parametrize("groups", GROUPS)


def positions():
    rng = np.random.default_rng(0)
    lattice = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), -1).reshape(-1, 3)
    x = (lattice / 6 + rng.normal(scale=0.01, size=(N, 3))) @ BOX
    # Particles that never interact, or are excluded, may be in one place.
    x[150] = x[149]
    return torch.tensor(x)


def system_of(energy, groups, method="CutoffPeriodic", *, tail=False):
    rng = np.random.default_rng(2)
    system, force = openmm.System(), openmm.CustomNonbondedForce(ENERGIES[energy])
    system.setDefaultPeriodicBoxVectors(*BOX)
    force.addPerParticleParameter("s")
    force.addGlobalParameter("lambda", 0.8)
    force.addTabulatedFunction("t", openmm.Discrete2DFunction(3, 4, rng.normal(size=12)))
    force.setNonbondedMethod(getattr(openmm.CustomNonbondedForce, method))
    force.setCutoffDistance(0.75)
    force.setUseSwitchingFunction(method == "CutoffPeriodic")
    force.setSwitchingDistance(0.6)
    force.setUseLongRangeCorrection(tail)
    for _ in range(N):
        system.addParticle(10.0)
        force.addParticle([rng.uniform(0.2, 0.4)])
    for i in range(0, N - 1, 5):
        force.addExclusion(i, i + 1)
    force.addExclusion(149, 150)
    for first, second in GROUPS[groups]:
        force.addInteractionGroup(first, second)
    system.addForce(force)
    return system


def grafted(*args, **options):
    potential = mdgraft.graft(system_of(*args, **options))
    assert potential.term("CustomNonbondedForce")._compiled.serve(positions()[None])
    return potential, torch.tensor(BOX) if potential.periodic else None


@each_group
@each_energy
@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_openmm_and_plain_torch(energy, groups, method):
    system, x = system_of(energy, groups, method), positions()
    potential, box = grafted(energy, groups, method)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(x.numpy())
    state = context.getState(energy=True, forces=True)
    y = x.clone().requires_grad_()
    value = potential(y, box)
    assert value.item() == pytest.approx(state.getPotentialEnergy()._value, rel=1e-9, abs=1e-12)
    (slope,) = torch.autograd.grad(value, y)
    forces = state.getForces(asNumpy=True)._value
    np.testing.assert_allclose(-slope.numpy(), forces, rtol=0, atol=1e-9 * np.abs(forces).max())
    assert_kernels_agree(potential, x, box, rtol=1e-10)


@each_group
@each_energy
def test_higher_derivatives(energy, groups):
    potential, box = grafted(energy, groups)

    def third():
        inputs = [positions().requires_grad_(), box.clone().requires_grad_()]
        inputs += [p for p in potential.parameters() if p.numel()]
        rng = torch.Generator().manual_seed(5)
        total, found = potential(*inputs[:2]), []
        for k in range(3):
            slopes = torch.autograd.grad(
                total, inputs, create_graph=k < 2, allow_unused=True, materialize_grads=True
            )
            found += slopes
            steps = [torch.randn(s.shape, generator=rng, dtype=s.dtype) for s in slopes]
            total = sum((s * d).sum() for s, d in zip(slopes, steps, strict=True))
        return [s.detach() for s in found]

    found = third()
    with mdgraft.plain_kernels():
        expected = third()
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max() + 1e-9


def test_with_a_long_range_correction():
    potential, box = grafted("singular", "a few with the rest", tail=True)
    assert_kernels_agree(potential, positions(), box, rtol=1e-10)


def test_tiles_without_pairs_are_left_out(monkeypatch):
    kept = []
    original = thinning.thinned

    def spy(tiles, kinds):
        result = original(tiles, kinds)
        kept.append((len(result.tiles), len(tiles.tiles)))
        return result

    monkeypatch.setattr("mdgraft.kernels.fused.pair_kernel.thinned", spy)
    for groups, part in (("a few with the rest", 0.3), ("more kinds than bits", 1.0)):
        potential, box = grafted("symmetric", groups)
        potential(positions(), box)
        after, before = kept.pop()
        assert 0 < after <= part * before


def test_frames_one_by_one():
    potential, box = grafted("not symmetric", "several, some pairs twice")
    x = (
        positions()
        + 0.01 * torch.randn(6, N, 3, generator=torch.Generator().manual_seed(1)).double()
    )
    found = potential(x, box)
    with mdgraft.plain_kernels():
        torch.testing.assert_close(found, potential(x, box), rtol=1e-11, atol=1e-11)


def test_few_pairs_of_a_large_open_system_are_listed(monkeypatch):
    """Without a cutoff loops would search all pairs for them."""
    n = 30_000
    system, force = openmm.System(), openmm.CustomNonbondedForce("s1*s2/r")
    force.addPerParticleParameter("s")
    for _ in range(n):
        system.addParticle(1.0)
        force.addParticle([0.5])
    force.addInteractionGroup(range(3), range(3, n))
    system.addForce(force)
    potential = mdgraft.graft(system)
    x = torch.rand(n, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 9.0
    monkeypatch.setattr("mdgraft.kernels.fused.pair_kernel.tile_list", None)
    found = potential(x)
    apart = torch.cdist(x[:3], x[3:])
    torch.testing.assert_close(found, (0.25 / apart).sum())
