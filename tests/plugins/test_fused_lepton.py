"""Expressions of pairs in compiled loops against plain torch operations."""

import copy
import pickle
import random

import mdgraft
import numpy as np
import pytest
import scipy.special
import torch
from mdgraft.kernels.fused.graph import Graph, gradient, tangents, topological
from mdgraft.kernels.fused.lepton import Distance, describe, symmetric, translate
from mdgraft.kernels.switch import compiled_from
from mdgraft.lepton import ContinuousTable, Expression
from mdgraft.lepton.syntax import FUNCTIONS
from mdgraft.potentials.custom.nonbonded import CustomNonbonded
from mdgraft.potentials.custom.pair_formula import expression_formula
from mdgraft.potentials.nonbonded import Method

N = 14
BOX = torch.tensor([[2.2, 0.0, 0.0], [0.5, 2.1, 0.0], [-0.6, 0.7, 2.3]]).double()
SETTINGS = {
    "open": {"method": Method.NO_CUTOFF},
    "cutoff": {"method": Method.CUTOFF_NON_PERIODIC, "cutoff": 0.9},
    "switched": {"method": Method.CUTOFF_NON_PERIODIC, "cutoff": 0.9, "switch": 0.6},
    "periodic": {"method": Method.CUTOFF_PERIODIC, "cutoff": 1.0},
    "switched-periodic": {"method": Method.CUTOFF_PERIODIC, "cutoff": 1.0, "switch": 0.7},
}
LJ = "4*sqrt(a1*a2)*((s/r)^12-(s/r)^6); s=0.2*(b1+b2)"
#: ``a`` and ``b`` are positive, ``t`` holds -1, 0, 1 and 2, and ``k`` and ``l`` are shared.
EXPRESSIONS = (
    LJ,
    "a1*a2*(1/(x+0.5)^2-1/(x+0.5))*k+b1*b2/(r^6+0.01)^(1/6); x=(r/0.3)^6",
    "k*((1-exp(-l*(r-r0)))^2-1); r0=0.1*(a1+a2)",
    "a1*a2*exp(-k*r)-b1*b2*1e-3/r^6+l/r^5-r^-3",
    # Each function.
    "sqrt(a1+r)+log(b2*r)+exp(-a2*r)",
    "sin(a1*r)*cos(b2*r)+tan(0.3*a2*r)",
    "sec(0.3*r)+csc(0.2+r)+cot(0.3+0.5*r*a1)",
    "asin(0.3*r)+acos(0.2*a1*r)+atan(b2*r)+atan2(a1*r, b2-0.7)",
    "sinh(a1*r)+cosh(b2*r)+tanh(a2/r)",
    "erf(a1*r)*erfc(b2*r)",
    "square(a1+r)+cube(b2-r)+recip(r+a2)",
    "floor(3*a1*r)+ceil(2*b2)*r",
    "abs(a1-a2)*r+abs(r-0.6)*k",
    "step(r-0.6)*a1+step(b1-b2)/r",
    "delta(t1)*r+delta(t1-t2)*a1",
    "min(a1*r, b2)+max(a2, b1/r)",
    "select(step(r-0.6), a1/r, b2*r)+select(t1, r, r^2)",
    # Ties.
    "min(t1, t2)*r+max(t1, t2)*r^2",
    "min(a1, a1*1)+max(r, r)*k",
    "abs(t1)*r+abs(t1-t2)/r",
    "step(t1)*r+step(t2-1)*r^2",
    # Powers.
    "(a1*r)^2.5+(b2/r)^-0.5+r^1.5",
    "(a1+r)^k+l^(b2*r)+(r/b1)^(a2-0.5)",
    "(0.9+t1*t1)^(t2+0.5)*r",
    "(a1/r)^7-(a2*r)^-4+(r-0.4)^5+2^r",
    "r^3/(a1*r)^2*(b2/r)^3",
    "q^4-q; q=a1/r+a2/r-0.1*k/r",
    # Branches that are not taken are not numbers, or infinite.
    "select(step(r-0.6), sqrt(r-0.6), -sqrt(0.6-r))",
    "select(t1, a1/t1, r)+min(1/t1^2, r)",
    "max(log(r-0.5), -3)*a1",
    # Nested, and with equal parts.
    "exp(-abs(sin(a1*r)-cos(a2*r)))/(1+square(tanh(b1*b2-r)))*(k+l*r)",
    "u*exp(-u)+v^2/(1+u^2); u=v*r; v=sqrt(a1*a2+k)",
    # Little to do.
    "k*r^2",
    "a1*b2",
    "1.5",
    "k",
    "r",
    "0*r",
)
NAMES = ("a", "b", "t")


def system(expression, setting, dtype=torch.float64, *, n=N, box=BOX, **options):
    """A term, its positions ``(3, n, 3)``, boxes and parameters."""
    rng = np.random.default_rng(len(expression))
    a, b = rng.uniform(0.3, 1.2, (2, n))
    # All that there is of t, in pairs of equal ones.
    values = {"a": a, "b": b, "t": np.resize([0.0, 1.0, -1.0, 0.0, 2.0, 1.0], n)}
    values = {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
    settings = dict(SETTINGS[setting])
    switch = settings.pop("switch", None)
    term = CustomNonbonded(
        expression,
        values,
        n_particles=n,
        exclusions=torch.tensor([[0, 1], [7, 3]]),
        switching_distance=None if switch is None else torch.tensor(switch, dtype=dtype),
        global_names=("k", "l"),
        **settings,
        **options,
    )
    shared = {"k": torch.tensor(0.7, dtype=dtype), "l": torch.tensor(1.3, dtype=dtype)}
    ticks = np.arange(np.ceil(n ** (1 / 3)))
    side = np.stack(np.meshgrid(ticks, ticks, ticks), axis=-1).reshape(-1, 3)[:n]
    places = 0.45 * side + rng.normal(scale=0.05, size=(3, n, 3)) + 4.0
    boxes = torch.stack([box, 1.02 * box, 0.99 * box]) if term.periodic else None
    values |= {k: p.detach() for k, p in term.parameter_values().items()}
    return (
        term,
        torch.tensor(places, dtype=dtype),
        boxes if boxes is None else boxes.to(dtype),
        values,
        shared,
    )


def derivatives(case, *, second=True, n_frames=3):
    """Energies, all gradients, and all gradients of a product with them."""
    term, positions, boxes, values, shared = case
    inputs = [positions[:n_frames], *([] if boxes is None else [boxes[:n_frames]])]
    n = len(inputs)
    inputs = [t.clone().requires_grad_() for t in (*inputs, *values.values(), *shared.values())]
    x, h = inputs[0], inputs[1] if n == 2 else None
    own = dict(zip(values, inputs[n:], strict=False))
    globals_ = dict(zip(shared, inputs[n + len(own) :], strict=True))
    energies = term(x, h, own, globals_)
    weights = torch.linspace(0.5, 1.5, n_frames, dtype=x.dtype)
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(energies @ weights, inputs, create_graph=second, **options)
    if not second:
        return [energies, *first]
    random_ = torch.Generator().manual_seed(1)
    weights = [torch.randn(g.shape, generator=random_, dtype=torch.float64) for g in first]
    change = sum((g * w.to(g)).sum() for g, w in zip(first, weights, strict=True))
    return [energies, *first, *torch.autograd.grad(change, inputs, **options)]


def compiled(case, **options):
    with compiled_from(0):
        assert case[0]._compiled.serve(case[1])
        return derivatives(case, **options)


def assert_same(found, expected, rtol):
    # What cancels in one derivative is as large as others.
    scale = 1.0
    for one, other in zip(found, expected, strict=True):
        scale = max(scale, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("place", range(len(EXPRESSIONS)), ids=lambda k: EXPRESSIONS[k][:24])
def test_expressions(place):
    """Value, first and second derivatives in everything, in both precisions."""
    setting = list(SETTINGS)[place % len(SETTINGS)]
    case = system(EXPRESSIONS[place], setting)
    assert_same(compiled(case), derivatives(case), 1e-11)
    case = system(EXPRESSIONS[place], setting, torch.float32)
    assert_same(compiled(case, second=False), derivatives(case, second=False), 2e-5)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("expression", [LJ, "a1*b2^2/r+k*t1*exp(-l*r)+c1"], ids=["lj", "ordered"])
def test_settings(setting, expression):
    """With and without cutoff, switching function, box, computed values; one frame and three."""
    case = system(expression, setting, computed_values={"c": "a*b+k"})
    for n_frames in (1, 3):
        assert_same(compiled(case, n_frames=n_frames), derivatives(case, n_frames=n_frames), 1e-11)
    assert_same(compiled(copy.deepcopy(case)), derivatives(case), 1e-11)
    assert_same(compiled(pickle.loads(pickle.dumps(case))), derivatives(case), 1e-11)


@pytest.mark.parametrize("setting", ["open", "cutoff", "periodic"])
def test_many_particles(setting):
    """Lists of many tiles; the order of particles in them is not that of their indices."""
    case = system("a1*b2^2/r^2+k*exp(-r)+t1", setting, n=100, box=1.1 * BOX)
    assert case[0]._compiled.serve(case[1])
    with mdgraft.plain_kernels():
        expected = derivatives(case)
    assert_same(derivatives(case), expected, 1e-11)


@pytest.mark.parametrize("setting", ["open", "switched-periodic"])
def test_mapped(setting):
    """Batches of positions and of parameters."""
    term, positions, boxes, values, shared = system(LJ, setting)
    h = None if boxes is None else boxes[:1]

    def energy(x, a, k):
        return term(x[None], h, values | {"a": a}, shared | {"k": k}).sum()

    batch = torch.stack([values["a"], 1.1 * values["a"], 0.7 + values["a"]])
    for dims in ((0, None, None), (0, 0, None), (None, 0, None)):
        arguments = [
            t if dim == 0 else t[0] for t, dim in zip((positions, batch), dims, strict=False)
        ]
        for function in (energy, torch.func.grad(energy, argnums=(0, 1))):
            mapped = torch.func.vmap(function, in_dims=dims)
            expected = mapped(*arguments, shared["k"])
            with compiled_from(0):
                found = mapped(*arguments, shared["k"])
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_third_derivatives():
    """They are those of the plain sum."""
    term, positions, boxes, values, shared = system("a1*b2/r^2+k*t1", "periodic")
    x = positions[:1]

    def energy(x, a):
        return term(x, boxes[:1], values | {"a": a}, shared).sum()

    def third(x, a):
        def slope(y):
            return torch.func.jvp(lambda z: energy(z, a), (y,), (x.cos(),))[1]

        return torch.func.grad(lambda y: torch.func.jvp(slope, (y,), (x.sin(),))[1])(x)

    expected = third(x, values["a"])
    with compiled_from(0):
        torch.testing.assert_close(third(x, values["a"]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("expression", ["r^2+a1", "exp(-r)*a1*a2", "a1/(r^6+1)", "r*a1", "cos(r)"])
def test_coincident_particles(expression):
    """A distance of zero has no derivative, like in plain torch."""
    case = system(expression, "open")
    case[1][:, 5] = case[1][:, 4]
    expected = derivatives(case, second=False)
    assert all(t.isfinite().all() for t in expected)
    assert_same(compiled(case, second=False), expected, 1e-11)
    # Even powers have the true curvature; to plain torch nothing depends on r = 0.
    assert all(t.isfinite().all() for t in compiled(case))


@pytest.mark.parametrize(
    "expression",
    ["log(r-0.5)", "1/t1", "sqrt(a1-0.6)", "step(r-0.6)*log(r-0.6)", "1/(1+exp(1e4*r))"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_what_is_not_finite(expression, dtype):
    """Infinite and undefined energies stay so; pairs beyond the cutoff do not count."""
    case = system(expression, "cutoff", dtype)
    found, expected = compiled(case, second=False)[0], derivatives(case, second=False)[0]
    torch.testing.assert_close(found.isfinite(), expected.isfinite())
    torch.testing.assert_close(found.nan_to_num(), expected.nan_to_num(), rtol=1e-5, atol=1e-5)


def test_nothing_comes_from_beyond_the_cutoff():
    case = system("a1*a2*sqrt(1-(r/0.9)^2)", "cutoff")
    found = compiled(case)
    assert all(t.isfinite().all() for t in found)
    assert_same(found, derivatives(case), 1e-11)


def test_what_stays_plain():
    """Small systems, above all with tables or interaction groups, and long expressions."""
    case = system(LJ, "open")
    assert not case[0]._compiled.serve(case[1])
    with compiled_from(0):
        assert case[0]._compiled.serve(case[1])
        with mdgraft.plain_kernels():
            assert not case[0]._compiled.serve(case[1])
        case = system("+".join(f"a1*a2*r^{k}" for k in range(200)), "open")
        assert not case[0]._compiled.serve(case[1])
        case = system(LJ, "open", groups=[([0, 1], [2, 3])])
        assert not case[0]._compiled.serve(case[1])
        table = (ContinuousTable((5,), ((0.0, 2.0),)), torch.arange(5.0).double())
        case = system("f(r)*a1", "open", tables={"f": table})
        assert not case[0]._compiled.serve(case[1])


# Formulas -------------------------------------------------------------------------------------


def test_equal_expressions_share_code():
    """Names do not matter, and neither do settings that are no part of the formula."""
    texts = ("p1*p2/r+g", "q1*q2/r+h")
    found = []
    for text, names in zip(texts, ("pg", "qh"), strict=True):
        program = Expression(
            text, variables=("r", f"{names[0]}1", f"{names[0]}2", names[1])
        ).program
        known = {"r": "r", f"{names[0]}1": "0_1", f"{names[0]}2": "0_2", names[1]: "shared0"}
        found.append(describe(program, known))
    assert found[0] == found[1]
    options = {"n_particle": 1, "n_shared": 1, "ordered": "", "switched": False}
    assert expression_formula(found[0], **options) is expression_formula(found[1], **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a1*a2/r", True),
        ("k*a1*r*a2", True),
        ("a1/r*a2-b1/2-b2*0.5", True),
        ("sqrt(a1*b2)+sqrt(b1*a2)", True),
        ("exp(-(a1+k+a2))*(b1+b2)^2", True),
        ("k*r", True),
        ("a1/r", False),
        ("a1*b2", False),
        ("a1-a2", False),
        # Which of equal ones has the slope is a matter of order.
        ("min(a1, a2)", False),
        ("a1^a2", False),
    ],
)
def test_symmetric(text, expected):
    names = {name: name for name in ("r", "k", "a1", "a2", "b1", "b2")}
    description = describe(Expression(text, variables=names).program, names)
    exchanged = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    assert symmetric(description, exchanged) is expected


NUMPY = {
    **{f: getattr(np, f) for f in ("exp", "log", "sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{f: getattr(np, f) for f in ("sqrt", "floor", "ceil", "add", "subtract", "multiply")},
    **{f: getattr(np, f) for f in ("divide", "negative", "less", "less_equal", "equal")},
    **{"asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "atan2": np.arctan2},
    **{"erf": scipy.special.erf, "erfc": scipy.special.erfc, "pow": np.power},
    **{"rsqrt": lambda x: 1 / np.sqrt(x), "select": np.where},
}


def evaluate(roots, inputs):
    """Formulas by numpy, without compiling them."""
    found = {}
    for node in topological(roots):
        if node.operation == "constant":
            found[node.index] = np.float64(node.payload)
        elif node.operation == "input":
            found[node.index] = inputs[node.payload]
        else:
            arguments = [found[a.index] for a in node.arguments]
            found[node.index] = NUMPY[node.operation](*arguments)
    return [np.broadcast_to(found[root.index], inputs["u"].shape) for root in roots]


EXPONENTS = ("2", "3", "-1", "-2", "-3", "6", "-6", "0.5", "-0.5", "1.5", "k")


def write(rng, depth):
    """A random expression."""
    kind = rng.random()
    if depth == 0 or kind < 0.12:
        return rng.choice(["r", "r", "a1", "a2", "k", "0.5", "2", "3.1"])
    if kind < 0.6:
        operator = rng.choice("+-*/^*/")
        left = write(rng, depth - 1)
        if operator == "^":
            exponent = rng.choice(
                ["2", "3", "-1", "-2", "-3", "6", "-6", "0.5", "-0.5", "1.5", "k"]
            )
            base = rng.choice([left, left, "1.7"])
            return f"({base})^({exponent if base == left else write(rng, depth - 1)})"
        return f"({left}{operator}{write(rng, depth - 1)})"
    if kind < 0.66:
        return f"-({write(rng, depth - 1)})"
    name = rng.choice(sorted(FUNCTIONS))
    return f"{name}({','.join(write(rng, depth - 1) for _ in range(FUNCTIONS[name]))})"


@pytest.mark.parametrize("seed", range(6))
def test_random_formulas(seed):
    """Value, slopes and curvatures as in plain torch, at arguments that tie, too."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    names = ("r", "a1", "a2", "k")
    for _ in range(150):
        text = write(rng, rng.choice([2, 3, 4]))
        expression = Expression(text, variables=names)
        points = {
            name: np.where(numbers.random(12) < 0.4, numbers.choice([1.0, 2.0], 12), free)
            for name, free in zip(names, numbers.uniform(0.1, 2, (4, 12)), strict=True)
        }
        points["a1"] = numbers.choice([-1, 0, 1], 12) * points["a1"]
        along = dict(zip(names, numbers.normal(size=(4, 12)), strict=True))
        expected = by_torch(expression, points, along)
        with np.errstate(all="ignore"):
            found = by_formula(expression, points, along)
            reliable, size = np.full(12, True), np.ones(12)
            for order, (one, other) in enumerate(zip(found, expected, strict=True)):
                if order == 0:
                    assert not (np.isfinite(one) & ~np.isfinite(other)).any(), text
                good = reliable & np.isfinite(other).all(axis=0)
                size = np.maximum(size, np.abs(np.where(good, other, 0)).max(axis=0))
                wrong = good & (size < 1e12) & ~(np.abs(one - other) <= 1e-9 * size)
                assert not wrong.any(), f"order {order} of {text!r}: {one} instead of {other}"
                reliable = good


def by_torch(expression, points, along):
    """Value ``(1, points)``, slopes and their changes ``(4, points)``."""
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in points.items()}

    def slopes(y, create_graph):
        if not y.requires_grad:
            return [torch.zeros(12, dtype=torch.float64)] * 4
        return torch.autograd.grad(
            y.sum(),
            list(tensors.values()),
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )

    value = expression(tensors).expand(12)
    first = slopes(value, True)
    change = sum(g * torch.tensor(along[name]) for g, name in zip(first, tensors, strict=True))
    second = slopes(change, False)
    return [torch.stack(list(rows)).detach().numpy() for rows in ((value.double(),), first, second)]


def by_formula(expression, points, along):
    """The same from a formula of ``u = r^2``."""
    graph = Graph()
    u, tiny = graph.input("u"), graph.constant(1e-200)
    nodes = {name: graph.input(name) for name in points if name != "r"}
    description = describe(expression.program, {name: name for name in points})
    distance = Distance(u, tiny)
    value = translate(description, graph, nodes, distance)
    if distance.rooted:
        value = translate(description, graph, nodes, Distance(u, tiny, rooted=True))
    first = gradient(value, [u, *nodes.values()])
    seeds = {node: graph.input(f"d{name}") for name, node in {"u": u, **nodes}.items()}
    second = tangents(first, seeds)
    r, dr = points["r"], along["r"]
    inputs = points | {f"d{name}": d for name, d in along.items()}
    inputs |= {"u": r * r, "du": 2 * r * dr}
    values = evaluate([value, *first, *second], inputs)
    in_u, change_in_u = values[1], values[5]
    return [
        np.stack(values[:1]),
        np.stack([2 * r * in_u, *values[2:5]]),
        np.stack([2 * r * change_in_u + 2 * dr * in_u, *values[6:9]]),
    ]
