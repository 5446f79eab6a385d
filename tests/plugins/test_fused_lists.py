"""Lists of tiles that are used again, and particles that are lost."""

import itertools
import math

import mdgraft
import numpy as np
import pytest
import torch
from mdgraft.kernels.fused.clusters import Exclusions
from mdgraft.kernels.fused.pair_formulas import PairFormula
from mdgraft.kernels.fused.pair_kernel import PairKernel
from mdgraft.kernels.pairs import close_pairs
from mdgraft.kernels.periodic import minimum_image
from mdgraft.potentials.direct_space import DirectSpace
from mdgraft.potentials.nonbonded import Method, NonbondedSettings

NONE = np.empty((0, 2), dtype=int)


def make_kernel(n, cutoff, exclusions):
    formula = PairFormula(
        particle=("q",),
        shared=(),
        constants=("c2",),
        energy=lambda graph, u, a, b, common: a["q"] * b["q"] * (1 - u / common["c2"]),
    )
    return PairKernel(
        formula,
        cutoff=cutoff,
        exclusions=Exclusions.of_pairs(exclusions, n),
        constants={"c2": min(cutoff, 5.0) ** 2},
        table=lambda series: np.empty(0),
        reference=None,
    )


def expected(positions, box, charges, cutoff, exclusions):
    """The same from all pairs, in double precision."""
    n = positions.shape[1]
    i, j = torch.triu_indices(n, n, 1)
    keep = torch.ones(n, n, dtype=torch.bool)
    keep[exclusions[:, 0], exclusions[:, 1]] = keep[exclusions[:, 1], exclusions[:, 0]] = False
    i, j = i[keep[i, j]], j[keep[i, j]]
    vectors = (positions[:, j] - positions[:, i]).double()
    if box.shape[1]:
        vectors = minimum_image(vectors, box[:, None].double())
    u = (vectors**2).sum(dim=-1)
    energies = (charges[i] * charges[j]).double() * (1 - u / min(cutoff, 5.0) ** 2)
    return torch.where(u < cutoff**2, energies, 0.0).sum(dim=-1)


@pytest.mark.parametrize("cutoff", [0.9, math.inf])
@pytest.mark.parametrize("seed", range(4))
def test_lists_that_are_used_again(seed, cutoff):
    rng = np.random.default_rng(seed)
    n = 150
    exclusions = rng.integers(0, n, (40, 2))
    exclusions = exclusions[exclusions[:, 0] != exclusions[:, 1]]
    kernel = make_kernel(n, cutoff, exclusions)
    x = 2.5 * rng.random((3, n, 3))
    cell = np.array([[2.4, 0, 0], [0.7, 2.2, 0], [-1.2, 1.0, 2.0]])
    charges = rng.normal(size=n)
    made = set()
    for _ in range(60):
        kind = rng.integers(8)
        if kind < 4:
            # In place: a list must not hold on to an array of the caller.
            x[:] += rng.choice([1e-4, 5e-3, 0.02]) * rng.normal(size=x.shape)
        elif kind == 4:
            x[:] = 2.5 * rng.random(x.shape)
        elif kind == 5:
            x[:, rng.integers(n)] += rng.choice([0.04, 0.06, 3.0]) * rng.normal(size=3)
        elif kind == 6:
            cell *= rng.uniform(0.99, 1.01)
            cell *= max(1.0, 1.8 / np.diagonal(cell).min())
        dtype = torch.float64 if rng.random() < 0.6 else torch.float32
        n_frames = int(rng.choice([1, 1, 1, 3]))
        positions = torch.from_numpy(x[:n_frames])
        if dtype == torch.float32:
            positions = positions.float()
        periodic = math.isfinite(cutoff) and rng.random() < 0.8
        box = torch.tensor(np.stack([cell] * n_frames) if periodic else np.zeros((n_frames, 0, 3)))
        q = torch.tensor(charges, dtype=dtype)
        energies = kernel.energies([positions, box.to(dtype), q])
        wanted = expected(positions, box.to(dtype), q, cutoff, exclusions)
        tolerance = 1e-9 if dtype == torch.float64 else 2e-3
        torch.testing.assert_close(energies.double(), wanted, rtol=0, atol=tolerance)
        made.update(id(known) for known in kernel._known.values())
    assert len(made) > 1


def test_a_list_serves_small_steps_only():
    rng = np.random.default_rng(0)
    kernel = make_kernel(150, 1.0, NONE)
    x = torch.tensor(3 * rng.random((1, 150, 3)))
    inputs = [x, 3 * torch.eye(3, dtype=torch.float64)[None], torch.ones(150, dtype=torch.float64)]
    kernel.energies(inputs)
    (first,) = kernel._known.values()
    x[0, 7, 0] += 0.049
    kernel.energies(inputs)
    (second,) = kernel._known.values()
    assert second is first
    x[0, 7, 0] += 0.003
    kernel.energies(inputs)
    (third,) = kernel._known.values()
    assert third is not first


@pytest.mark.parametrize("cutoff", [0.9, math.inf])
def test_deterministic_sums_do_not_depend_on_what_was_before(cutoff):
    rng = np.random.default_rng(1)
    x = torch.tensor(3 * rng.random((1, 150, 3)))
    empty = torch.zeros(1, 0, 3, dtype=torch.float64)
    q = torch.tensor(rng.normal(size=150))
    used = make_kernel(150, cutoff, NONE)
    used.energies([x + 0.01, empty, q])
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            x = x + 1e-3 * torch.randn(x.shape, dtype=x.dtype)
            fresh = make_kernel(150, cutoff, NONE)
            assert used.energies([x, empty, q]) == fresh.energies([x, empty, q])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cutoff", [0.9, math.inf])
def test_a_lost_particle_has_no_energy(lost, cutoff):
    x = torch.rand(2, 150, 3, dtype=torch.float64)
    x[1, 3, 1] = lost
    q = torch.ones(150, dtype=torch.float64)
    kernel = make_kernel(150, cutoff, NONE)
    inputs = [x, torch.zeros(2, 0, 3, dtype=torch.float64), q]
    energies, (force, _, by_charge) = kernel.gradients(inputs, [True, True, True])
    assert energies.isfinite().tolist() == [True, False]
    assert force.isfinite().all(dim=-1).all(dim=-1).tolist() == [True, False]
    assert by_charge.isfinite().all(dim=-1).tolist() == [True, False]
    with pytest.raises(mdgraft.InvalidInputError, match="particle 3"):
        close_pairs(x[1].numpy(), None, 0.9)


def test_the_term_agrees_with_plain_torch_along_a_walk():
    rng = np.random.default_rng(3)
    n = 160
    settings = NonbondedSettings(method=Method.PME, cutoff=1.0, alpha=3.0)
    exceptions = torch.tensor(list(itertools.pairwise(range(40))))
    term = DirectSpace(settings, exceptions, n, switched=False)
    charge = torch.tensor(rng.normal(size=n))
    sigma, epsilon = torch.full((n,), 0.05).double(), torch.full((n,), 0.3).double()
    grid = np.stack(np.meshgrid(*[np.arange(6)] * 3), axis=-1).reshape(-1, 3)[:n] * 0.4
    x = torch.tensor(grid + 0.05 * rng.random((n, 3)))[None]
    box = 2.4 * torch.eye(3, dtype=torch.float64)[None]
    for step in range(30):
        x = x + rng.choice([1e-3, 0.01]) * torch.tensor(rng.normal(size=x.shape))
        box = box * (1.01 if step % 7 == 6 else 1.0)
        dtype = torch.float64 if step % 3 else torch.float32
        inputs = [t.to(dtype) for t in (x, box, charge, sigma, epsilon)]
        energy = term.energy(*inputs, [])
        with mdgraft.plain_kernels():
            plain = term.energy(*inputs, [])
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(energy, plain, rtol=tolerance, atol=tolerance)
