"""Kernels for GPUs against plain torch operations: interpreted where there is no GPU."""

import mdgraft
import pytest
import torch
from device_cases import (
    ALL,
    DEVICE,
    ON_GPU,
    N,
    assert_same,
    boxes,
    column,
    expected,
    found,
    on_the_device,
    places,
    rows,
)
from mdgraft import Frames, Potential
from mdgraft.ensembles.frame_derivatives import frame_derivatives
from mdgraft.potentials.custom.external import CustomExternal
from mdgraft.potentials.nonbonded import Method, Nonbonded, NonbondedSettings

pytestmark = pytest.mark.usefixtures("interpreter")


# Properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_all_derivatives_up_to_the_second(name):
    term = ALL[name]()
    assert_same(found(term), expected(term), 1e-10)


@pytest.mark.parametrize(
    "name",
    ["cutoff", "PME, offsets", "LJPME", "symmetric", "OBC, periodic", "custom GB", "torsions"]
    + ["powers", "torsion", "external", "tables", "groups", "custom GB, tables"],
)
def test_single_precision(name):
    """Against the plain form in double precision."""
    term = ALL[name]()
    assert_same(found(term.float(), dtype=torch.float32), expected(term.double()), 1e-4)


@pytest.mark.parametrize(
    "name",
    ["PME, offsets", "OBC", "custom GB", "angles", "powers", "tables", "groups"]
    + ["custom GB, tables"],
)
def test_batches_of_frames(name):
    term = ALL[name]()
    assert_same(found(term, 3), expected(term, 3), 1e-10)


@pytest.mark.parametrize("name", ["cutoff", "bonds", "PME, offsets"])
def test_no_frames_at_all(name):
    term = ALL[name]()
    results = found(term, x=places(1)[:0])
    assert results[0].shape == (0,)
    assert all(not r.any() for r in results[3:])


@pytest.mark.parametrize("name", ["cutoff", "PME, offsets", "torsions"])
def test_lost_particles_are_not_numbers(name):
    """In their frame, and in no other."""
    term = ALL[name]()
    x = places(2)
    expect = expected(term, x=x[:1], order=1)
    x[1, int(rows(4)[0, 0])] = torch.nan
    results = found(term, x=x, order=1)
    torch.testing.assert_close(results[0][:1], expect[0])
    assert results[0][1].isnan()
    torch.testing.assert_close(results[1][:1], expect[1], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["cutoff", "bonds"])
def test_transforms(name):
    """`torch.func` on top of `torch.vmap`, in both modes."""
    term = ALL[name]()
    own = {k: p.detach() for k, p in term.parameter_values().items()}
    x, h = places(2), boxes()

    def results(device):
        moved = {k: p.to(device) for k, p in own.items()}
        term.to(device)

        def energy(one):
            cell = h.to(device) if term.periodic else None
            return term(one[None], cell, moved, {})[0]

        slopes = torch.vmap(torch.func.grad(energy))(x.to(device))
        step = torch.ones_like(slopes[0])
        turned = torch.func.jvp(torch.func.grad(energy), (x[0].to(device),), (step,))[1]
        term.to("cpu")
        return [slopes.cpu(), turned.cpu()]

    with on_the_device():
        one = results(DEVICE)
    with mdgraft.plain_kernels():
        other = results("cpu")
    assert_same(one, other, 1e-10)


def test_a_whole_potential():
    """Forces, and what kernels tell about each frame, by the public functions."""
    terms = {name: ALL[key]() for name, key in (("N", "cutoff"), ("B", "bonds"), ("A", "angles"))}
    potential = Potential(terms, n_particles=N)
    x, h = places(3), boxes(3)
    names = ["N.sigma", "B.k", "A.angle"]

    def results(device):
        potential.to(device)
        frames = Frames(positions=x.to(device), box=h.to(device))
        every = frame_derivatives(potential, frames, names)
        forces = potential.forces(x.to(device), h.to(device))
        return [t.detach().cpu() for t in (every.energies, every.forces, every.gradients, forces)]

    with on_the_device():
        one = results(DEVICE)
    with mdgraft.plain_kernels():
        other = results("cpu")
    assert_same(one, other, 1e-10)


def test_third_derivatives_are_those_of_the_plain_form():
    term = ALL["bonds"]()
    assert_same(found(term, order=3), expected(term, order=3), 1e-9)


def test_results_are_repeatable_bit_by_bit():
    term = ALL["PME, offsets"]()
    torch.use_deterministic_algorithms(not ON_GPU)
    try:
        one, other = found(term, order=1), found(term, order=1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_lists_last_until_particles_have_moved_by_half_a_skin():
    term = ALL["cutoff"]()
    x = places()
    rng = torch.Generator().manual_seed(2)

    def kernel():
        (made,) = term._made.pairs._kernels.values()
        return made.kernel._known.clusters

    assert_same(
        found(term, x=x, order=1, stay=True), expected(ALL["cutoff"](), x=x, order=1), 1e-10
    )
    first = kernel()
    for size, same in ((0.01, True), (0.2, False)):
        step = torch.randn(x.shape, generator=rng, dtype=x.dtype)
        moved = x + size * step / step.norm(dim=-1).max()
        assert_same(
            found(term, x=moved, order=1, stay=True),
            expected(ALL["cutoff"](), x=moved, order=1),
            1e-10,
        )
        assert (kernel() is first) is same


def test_clusters_without_a_cutoff_are_made_anew_when_particles_are_far():
    term = ALL["open"]()
    x = places()
    for shift, same in ((0.3, True), (5.0, False)):
        assert_same(
            found(term, x=x, order=1, stay=True), expected(ALL["open"](), x=x, order=1), 1e-10
        )
        (made,) = term._made.pairs._kernels.values()
        first = made.kernel._known.clusters
        moved = x.clone()
        moved[0, 3] += shift
        assert_same(
            found(term, x=moved, order=1, stay=True),
            expected(ALL["open"](), x=moved, order=1),
            1e-10,
        )
        assert (made.kernel._known.clusters is first) is same


def test_a_new_box_makes_a_new_list():
    term = ALL["periodic, switched"]()
    x, h = places(), boxes()
    own = {k: p.detach() for k, p in term.parameter_values().items()}
    for scale in (1.0, 1.0 + 1e-3):
        with on_the_device():
            energy = term.to(DEVICE)(
                x.to(DEVICE), (scale * h).to(DEVICE), {k: p.to(DEVICE) for k, p in own.items()}, {}
            )
        term.to("cpu")
        with mdgraft.plain_kernels():
            torch.testing.assert_close(energy.cpu(), term(x, scale * h, own, {}))


def test_boxes_that_are_too_small_raise():
    term = ALL["periodic, switched"]()
    own = {k: p.detach().to(DEVICE) for k, p in term.parameter_values().items()}
    with on_the_device(), pytest.raises(mdgraft.BoxTooSmallError, match="needs at least 1.1 nm"):
        term.to(DEVICE)(places().to(DEVICE), 0.6 * boxes().to(DEVICE), own, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("exp", -80, 80),
        ("log", 0.0, 9.0),
        ("sin", -50, 50),
        ("cos", -1e6, 1e6),
        ("tan", -9, 9),
        ("asin", -1, 1),
        ("acos", -1, 1),
        ("atan", -9, 9),
        ("sinh", -9, 9),
        ("cosh", -9, 9),
        ("tanh", -9, 9),
        ("erf", -4, 4),
        ("erfc", -4, 9),
        ("sqrt", 0, 9),
        ("abs", -1, 1),
    ],
)
def test_functions(name, low, high, dtype):
    """Over the whole range, through a field that acts on one coordinate."""
    n = 64
    x = torch.linspace(low, high, n, dtype=dtype)
    term = CustomExternal(f"w*{name}(x)", torch.arange(n), {"w": torch.zeros(n, dtype=dtype)})
    weights = torch.ones(n, dtype=dtype, device=DEVICE).requires_grad_()
    with on_the_device():
        position = torch.stack([x, 0 * x, 0 * x], dim=-1)[None].to(DEVICE)
        energy = term.to(DEVICE)(position, None, {"w": weights}, {})
        (values,) = torch.autograd.grad(energy.sum(), weights)
    exact = getattr(torch, name)(x.double())
    eps = torch.finfo(dtype).eps
    allowed = (32 if dtype is torch.float32 else 200) * eps * exact.abs().clamp(min=1e-3)
    if name in ("sin", "cos", "tan") and not ON_GPU:
        # Some interpreters round products in sums.
        allowed = allowed + eps * x.double().abs() * (1 + exact * exact)
    error = (values.cpu().double() - exact).abs()
    assert bool(((error <= allowed) | (values.cpu() == exact)).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [1, 2])
def test_many_particles_on_a_gpu(dtype, order):
    """Thousands of clusters against the kernels of the CPU; warnings of kernels are errors."""
    side, n = 24, 24**3
    ticks = torch.arange(side).double()
    lattice = torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), dim=-1)
    g = torch.Generator().manual_seed(0)
    x = 0.33 * lattice.reshape(1, n, 3)
    x = x + 0.03 * torch.randn(x.shape, generator=g, dtype=x.dtype)
    term = Nonbonded(
        0.3 * (1.0 - 2.0 * (torch.arange(n) % 2)).double(),
        column(0.25, 0.3, n),
        column(0.2, 0.8, n, seed=1),
        exceptions=torch.empty(0, 2, dtype=torch.long),
        exception_charge_product=torch.empty(0).double(),
        exception_sigma=torch.empty(0).double(),
        exception_epsilon=torch.empty(0).double(),
        settings=NonbondedSettings(method=Method.PME, cutoff=0.9, alpha=3.3, grid=(64, 64, 64)),
    )
    box = 0.33 * side * torch.eye(3).double()[None]

    def results(kind, device):
        term.to(device=device, dtype=kind)
        names = ("charge", "sigma", "epsilon")
        place, cell = (t.to(device, kind).requires_grad_() for t in (x, box))
        own = {k: p.detach().clone().requires_grad_() for k, p in term.parameter_values().items()}
        inputs = [place, cell, *(own[k] for k in names)]
        energy = term(place, cell, own, {})
        slopes = torch.autograd.grad(energy.sum(), inputs, create_graph=order == 2)
        found = [energy, *slopes]
        if order == 2:
            found += torch.autograd.grad(slopes[0].square().sum(), inputs)
        return [t.detach().cpu().double() for t in found]

    one, other = results(dtype, "cuda"), results(torch.float64, "cpu")
    for a, b in zip(one, other, strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(
            a, b, rtol=0, atol=(1e-3 if dtype is torch.float32 else 1e-9) * scale
        )
