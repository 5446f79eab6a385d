"""Terms whose kernels run on a GPU, or interpreted where there is none, and their derivatives."""

import contextlib
import importlib.util
import math
import os
import sys

import mdgraft
import numpy as np
import pytest
import torch
from mdgraft.kernels.device.programs import interpreted
from mdgraft.kernels.switch import compiled_from, emulated_device, on_device
from mdgraft.lepton import ContinuousTable, DiscreteTable
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


def custom_pairs(expression, method=Method.CUTOFF_PERIODIC, *, groups=()):
    kinds = torch.arange(N).double() % 3
    entries = torch.linspace(0.3, 1.7, 9).double().sin()
    return CustomNonbonded(
        expression,
        {"a": column(0.3, 1.2), "b": column(0.3, 1.2, seed=1), "type": kinds},
        tables={
            "matrix": (DiscreteTable((3, 3)), entries),
            "curve": (ContinuousTable((9,), ((0.1, 0.5),)), entries.flip(0)),
        },
        groups=[tuple(np.array(part) for part in group) for group in groups],
        n_particles=N,
        exclusions=torch.tensor([[0, 1], [7, 3]]),
        method=method,
        cutoff=0.55,
        global_names=("k", "l"),
        switching_distance=torch.tensor(0.4).double(),
    )


def custom_gb(factor="1"):
    single, pair, every = Computation
    values = (
        ("u", f"a1*b2^2*exp(-k*r)*{factor}", every),
        ("v", "u1*u2/(1+r^2)+sin(u2)*a1", pair),
        ("w", "v*a+x*u-y^2+l", single),
    )
    terms = (("w*z+v", single), (f"u1*w2*r+a2*v1^2*{factor}", pair))
    return CustomGB(
        {"a": column(0.3, 1.2), "b": column(0.3, 1.2, seed=1)},
        tables={"rows": (DiscreteTable((5,)), torch.linspace(0.4, 1.2, 5).double())},
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
    "tables": lambda: custom_pairs("matrix(type1, type2)*r+a1*a2*curve(r)*matrix(1, type2)"),
    "groups": lambda: custom_pairs("a1*exp(-r/b2)", groups=[([0, 5, 9], range(N)), ([3], [5, 9])]),
    "groups, symmetric": lambda: custom_pairs(
        "(a1+a2)*r*curve(r)", Method.CUTOFF_NON_PERIODIC, groups=[(range(8), range(4, N))]
    ),
    "OBC": obc,
    "OBC, periodic": lambda: obc(0.45),
    "custom GB": custom_gb,
    "custom GB, tables": lambda: custom_gb("rows(4*b2)*rows(3*a1)"),
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


def derivatives(
    term, n_frames=1, *, dtype=torch.float64, device="cpu", order=2, x=None, stay=False
):
    """Energies, all gradients, and gradients of products with them, on the CPU in float64.

    The term, too, is on the CPU again, unless it shall stay.
    """
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
    if not stay:
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
