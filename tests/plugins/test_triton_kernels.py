"""Kernels for GPUs against plain torch operations: interpreted where there is no GPU."""

import contextlib
import importlib.util
import math
import os
import sys

import mdgraft
import numpy as np
import pytest
import torch
from mdgraft import Frames, Potential
from mdgraft.ensembles.frame_derivatives import frame_derivatives
from mdgraft.kernels.device.programs import interpreted, program, start
from mdgraft.kernels.switch import compiled_from, emulated_device, on_device
from mdgraft.potentials.bonded import HarmonicAngle, HarmonicBond, PeriodicTorsion, RBTorsion
from mdgraft.potentials.custom.bonds import CustomBonded
from mdgraft.potentials.custom.external import CustomExternal
from mdgraft.potentials.custom.gb import Computation, CustomGB, Step
from mdgraft.potentials.custom.nonbonded import CustomNonbonded
from mdgraft.potentials.nonbonded import Method, Nonbonded, NonbondedSettings, Offsets
from mdgraft.potentials.obc import GeneralizedBornOBC

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
if not ON_GPU and not interpreted():
    if "triton" in sys.modules:
        pytest.skip("triton was imported without its interpreter", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

#: Where the kernels run.
DEVICE = "cuda" if ON_GPU else "cpu"
N = 24
TRICLINIC = torch.tensor([[1.7, 0.0, 0.0], [0.5, 1.75, 0.0], [-0.6, 0.7, 1.8]]).double()


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Older interpreters cannot count up to a number that a program loads, with a newer numpy."""
    text = "@triton.jit\ndef count(x):\n    for k in range(tl.load(x)):\n        tl.store(x, k)\n"
    try:
        start(program("count", text), (1,), torch.tensor([2], device=DEVICE), warps=1)
    except Exception as error:
        if "0-dim" in str(error):
            pytest.skip("the interpreter of this triton does not work with this numpy")
        raise


@contextlib.contextmanager
def on_the_device():
    with compiled_from(0), contextlib.nullcontext() if ON_GPU else emulated_device():
        yield


# Systems --------------------------------------------------------------------------------------


def places(n_frames=1, n=N, width=1.0):
    """Particles near a lattice that is cut out of a periodic one, somewhere in space."""
    rng = np.random.default_rng(3)
    ticks = np.arange(4) / 4
    side = np.stack(np.meshgrid(ticks, ticks, ticks), axis=-1).reshape(-1, 3)[:n]
    fractional = side + rng.normal(scale=0.02, size=(n_frames, n, 3)) + 3.3 * (width - 1)
    return torch.tensor(fractional) @ TRICLINIC


def boxes(n_frames=1):
    return (1 + 0.005 * torch.arange(n_frames))[:, None, None] * TRICLINIC


def column(low, high, n=N, seed=0):
    return torch.tensor(np.random.default_rng(seed).uniform(low, high, n))


def nonbonded(method, *, switched=False, offsets=False):
    charge = column(0.1, 0.5) * torch.tensor([1.0, -1.0]).repeat(N // 2)
    exceptions = torch.tensor([[0, 1], [0, 5], [2, 3], [7, 4], [10, 20], [11, 23]])
    m = len(exceptions)
    kind = dict(target=torch.tensor([0, 3, 3]), parameter=torch.tensor([0, 1, 0]))
    grown = Offsets(
        **kind,
        scales=torch.tensor([[0.2, 0.01, 0.1], [-0.1, 0.02, 0.2], [0.3, 0.0, 0.1]]).double(),
        active=torch.tensor([True, True, True]),
    )
    return Nonbonded(
        charge,
        column(0.25, 0.33, seed=1),
        column(0.2, 0.8, seed=2),
        exceptions=exceptions,
        exception_charge_product=torch.tensor([0.0, 0.05, 0.0, -0.03, 0.02, 0.0]).double(),
        exception_sigma=column(0.25, 0.3, m),
        exception_epsilon=torch.tensor([0.0, 0.2, 0.0, 0.1, 0.3, 0.0]).double(),
        settings=NonbondedSettings(
            method=method,
            cutoff=math.inf if method is Method.NO_CUTOFF else 0.55,
            alpha=5.1,
            grid=(8, 9, 10),
            dispersion_alpha=4.2 if method is Method.LJPME else 0.0,
            dispersion_grid=(8, 8, 8),
            dispersion_correction=method is Method.CUTOFF_PERIODIC,
            exceptions_periodic=method is Method.PME,
        ),
        switching_distance=torch.tensor(0.4).double() if switched else None,
        reaction_field_dielectric=torch.tensor(50.0).double(),
        global_names=("k", "l") if offsets else (),
        global_defaults=torch.tensor([0.2, 0.4]).double() if offsets else None,
        particle_offsets=grown if offsets else None,
        exception_offsets=grown if offsets else None,
    )


def custom_pairs(expression, method=Method.CUTOFF_PERIODIC):
    return CustomNonbonded(
        expression,
        {"a": column(0.3, 1.2), "b": column(0.3, 1.2, seed=1)},
        n_particles=N,
        exclusions=torch.tensor([[0, 1], [7, 3]]),
        method=method,
        cutoff=0.55,
        global_names=("k", "l"),
        switching_distance=torch.tensor(0.4).double(),
    )


def custom_gb():
    single, pair, every = Computation
    values = (
        ("u", "a1*b2^2*exp(-k*r)", every),
        ("v", "u1*u2/(1+r^2)+sin(u2)*a1", pair),
        ("w", "v*a+x*u-y^2+l", single),
    )
    terms = (("w*z+v", single), ("u1*w2*r+a2*v1^2", pair))
    return CustomGB(
        {"a": column(0.3, 1.2), "b": column(0.3, 1.2, seed=1)},
        n_particles=N,
        computed_values=[Step(name=n, expression=e, computation=c) for n, e, c in values],
        energy_terms=[Step(expression=e, computation=c) for e, c in terms],
        exclusions=torch.tensor([[0, 1], [7, 3]]),
        method=Method.CUTOFF_NON_PERIODIC,
        cutoff=0.5,
        global_names=("k", "l"),
    )


def obc(cutoff=math.inf):
    numbers = {"solute_dielectric": 1.5, "solvent_dielectric": 78.0, "surface_area_energy": 2.2}
    return GeneralizedBornOBC(
        column(-0.5, 0.5),
        column(0.12, 0.2, seed=1),
        column(0.7, 0.9, seed=2),
        **{name: torch.tensor(value).double() for name, value in numbers.items()},
        cutoff=cutoff,
        periodic=cutoff < math.inf,
    )


def rows(width, n=9):
    rng = np.random.default_rng(width)
    return torch.tensor(np.stack([rng.permutation(N)[:width] for _ in range(n)]))


def custom_items(expression, width=2, *, periodic=False):
    values = {"a": column(0.3, 1.2, 9), "b": column(0.3, 1.2, 9, seed=1)}
    options = {"global_names": ("k", "l"), "periodic": periodic}
    if width == 1:
        return CustomExternal(expression, rows(1)[:, 0], values, **options)
    return CustomBonded(expression, rows(width), values, **options)


def nine(low, high, seed=0):
    return column(low, high, 9, seed)


PAIRS = {
    "open": lambda: nonbonded(Method.NO_CUTOFF),
    "cutoff": lambda: nonbonded(Method.CUTOFF_NON_PERIODIC),
    "periodic, switched": lambda: nonbonded(Method.CUTOFF_PERIODIC, switched=True),
    "PME, offsets": lambda: nonbonded(Method.PME, offsets=True),
    "LJPME": lambda: nonbonded(Method.LJPME),
    "symmetric": lambda: custom_pairs("k*(a1+a2)*exp(-r*b1*b2)/r"),
    "ordered": lambda: custom_pairs("a1*exp(-r/b2)+l*erfc(k*r)", Method.CUTOFF_NON_PERIODIC),
    "OBC": obc,
    "OBC, periodic": lambda: obc(0.45),
    "custom GB": custom_gb,
}
ITEMS = {
    "bonds": lambda: HarmonicBond(rows(2), nine(0.3, 0.5), nine(10, 90), periodic=True),
    "angles": lambda: HarmonicAngle(rows(3), nine(1, 3), nine(10, 90), periodic=True),
    "torsions": lambda: PeriodicTorsion(
        rows(4), torch.arange(9) % 4 + 1, nine(0, 3), nine(1, 9), periodic=False
    ),
    "RB torsions": lambda: RBTorsion(
        rows(4), *(nine(-3, 3, seed) for seed in range(6)), periodic=True
    ),
    "branches": lambda: custom_items("select(step(r-0.6), b*sqrt(r-0.6), sqrt(0.6-r))+min(a, r)"),
    "powers": lambda: custom_items("k*(1-exp(-a*(r-0.3)))^2+l*erf(r)+log(r)*r^1.7+b^r"),
    "angle": lambda: custom_items("a*acos(0.9*cos(theta))*sinh(theta)+tan(b*0.2*theta)", 3),
    "torsion": lambda: custom_items("a*atan(theta)+cosh(0.1*theta)*asin(sin(theta)/2)*tanh(b)", 4),
    "external": lambda: custom_items("a*(x-b)^2+k*sin(30*y)*z+floor(3*x)*ceil(z)+abs(y)", 1),
}
ALL = PAIRS | ITEMS


def derivatives(term, n_frames=1, *, dtype=torch.float64, device="cpu", order=2, x=None):
    """Energies, all gradients, and gradients of products with them, on the CPU in float64."""
    own = {k: p.detach() for k, p in term.parameter_values().items()}
    term = term.to(device=device)
    x = places(n_frames, width=1.7) if x is None else x
    shared = {"k": torch.tensor(0.7), "l": torch.tensor(1.3)}
    named = {"x": x, "h": boxes(len(x)), **own} | {f"globals.{k}": t for k, t in shared.items()}
    inputs = {
        name: t.to(device=device, dtype=dtype).detach().clone().requires_grad_()
        for name, t in named.items()
    }
    energies = term(
        inputs["x"],
        inputs["h"] if term.periodic else None,
        {name: inputs[name] for name in own},
        {name: inputs[f"globals.{name}"] for name in shared},
    )
    generator = torch.Generator().manual_seed(1)
    results, outputs = [energies], [energies]
    for k in range(order):
        weights = [
            torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs
        ]
        total = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
        outputs = torch.autograd.grad(
            total,
            list(inputs.values()),
            create_graph=k + 1 < order,
            allow_unused=True,
            materialize_grads=True,
        )
        results += outputs
    term.to(device="cpu")
    return [t.detach().to(device="cpu", dtype=torch.float64) for t in results]


def found(term, *args, **options):
    with on_the_device():
        assert on_device(torch.empty(0, device=DEVICE))
        return derivatives(term, *args, device=DEVICE, **options)


def expected(term, *args, **options):
    with mdgraft.plain_kernels():
        return derivatives(term, *args, **options)


def assert_same(one, other, rtol):
    # What cancels in one derivative is as large as others.
    scale = 1.0
    for a, b in zip(one, other, strict=True):
        scale = max(scale, float(b.abs().max())) if b.numel() else scale
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)


# Properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_all_derivatives_up_to_the_second(name):
    term = ALL[name]()
    assert_same(found(term), expected(term), 1e-10)


@pytest.mark.parametrize(
    "name",
    ["cutoff", "PME, offsets", "LJPME", "symmetric", "OBC, periodic", "custom GB", "torsions"]
    + ["powers", "torsion", "external"],
)
def test_single_precision(name):
    """Against the plain form in double precision."""
    term = ALL[name]()
    assert_same(found(term.float(), dtype=torch.float32), expected(term.double()), 1e-4)


@pytest.mark.parametrize("name", ["PME, offsets", "OBC", "custom GB", "angles", "powers"])
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

    assert_same(found(term, x=x, order=1), expected(term, x=x, order=1), 1e-10)
    first = kernel()
    for size, same in ((0.01, True), (0.2, False)):
        step = torch.randn(x.shape, generator=rng, dtype=x.dtype)
        moved = x + size * step / step.norm(dim=-1).max()
        assert_same(found(term, x=moved, order=1), expected(term, x=moved, order=1), 1e-10)
        assert (kernel() is first) is same


def test_clusters_without_a_cutoff_are_made_anew_when_particles_are_far():
    term = ALL["open"]()
    x = places()
    for shift, same in ((0.3, True), (5.0, False)):
        assert_same(found(term, x=x, order=1), expected(term, x=x, order=1), 1e-10)
        (made,) = term._made.pairs._kernels.values()
        first = made.kernel._known.clusters
        moved = x.clone()
        moved[0, 3] += shift
        assert_same(found(term, x=moved, order=1), expected(term, x=moved, order=1), 1e-10)
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
