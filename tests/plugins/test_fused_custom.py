"""Custom GB and custom bonded terms in compiled loops against plain torch operations."""

import copy
import pickle

import mdgraft
import numpy as np
import pytest
import torch
from mdgraft import Frames, Potential
from mdgraft.ensembles.frame_derivatives import frame_derivatives
from mdgraft.kernels.fused.graph import Graph, gradient, reverse_gradient, topological
from mdgraft.kernels.switch import compiled_from
from mdgraft.lepton import ContinuousTable
from mdgraft.potentials.custom.bonds import CustomBonded
from mdgraft.potentials.custom.compound_bond import CustomCentroidBond, CustomCompoundBond
from mdgraft.potentials.custom.external import CustomExternal
from mdgraft.potentials.custom.gb import Computation, CustomGB, Step
from mdgraft.potentials.nonbonded import Method

N = 12
BOX = torch.tensor([[2.2, 0.0, 0.0], [0.5, 2.1, 0.0], [-0.6, 0.7, 2.3]]).double()
MANY = 20
SINGLE, PAIR, EVERY = Computation
GLOBALS = ("k", "l")

# Systems --------------------------------------------------------------------------------------


def places(dtype, n=N):
    """Particles near a grid, ``(MANY, n, 3)``."""
    rng = np.random.default_rng(7)
    ticks = np.arange(np.ceil(n ** (1 / 3)))
    side = np.stack(np.meshgrid(ticks, ticks, ticks), axis=-1).reshape(-1, 3)[:n]
    return torch.tensor(0.4 * side + rng.normal(scale=0.06, size=(MANY, n, 3)), dtype=dtype)


def boxes(dtype):
    return torch.stack([(1 + 0.002 * k) * BOX for k in range(MANY)]).to(dtype)


def parameters(n, dtype):
    """``a`` and ``b`` are positive, ``t`` holds -1, 0, 1 and 2."""
    a, b = np.random.default_rng(n).uniform(0.3, 1.2, (2, n))
    t = np.resize([0.0, 1.0, -1.0, 0.0, 2.0, 1.0], n)
    return {k: torch.tensor(v, dtype=dtype) for k, v in {"a": a, "b": b, "t": t}.items()}


def items(width, n=N):
    """Rows of different particles."""
    rng = np.random.default_rng(width)
    return torch.tensor(np.stack([rng.permutation(n)[:width] for _ in range(11)]))


def item_term(kind, text, dtype=torch.float64, *, periodic=False):
    values, options = parameters(11, dtype), {"global_names": GLOBALS, "periodic": periodic}
    if kind in ("bond", "angle", "torsion"):
        width = {"bond": 2, "angle": 3, "torsion": 4}[kind]
        return CustomBonded(text, items(width), values, **options)
    if kind == "external":
        return CustomExternal(text, items(1)[:, 0], values, **options)
    if kind == "compound":
        return CustomCompoundBond(text, items(5), values, **options)
    return CustomCentroidBond(
        text,
        items(3, 5),
        values,
        members=torch.arange(N),
        group=torch.arange(N) % 5,
        masses=torch.linspace(1, 2, N, dtype=dtype),
        weighted=torch.arange(N) % 5 == 2,
        group_weights=torch.tensor([1.0, 0.5], dtype=dtype),
        n_groups=5,
        **options,
    )


METHODS = {
    "open": {"method": Method.NO_CUTOFF},
    "cutoff": {"method": Method.CUTOFF_NON_PERIODIC, "cutoff": 0.8},
    "periodic": {"method": Method.CUTOFF_PERIODIC, "cutoff": 0.9},
}
#: Values and energy terms: names, expressions and what they are summed over.
OBC = (
    (
        (
            "I",
            "select(step(r+b2-a1), 0.5*(1/L-1/U+0.25*(r-b2^2/r)*(1/(U^2)-1/(L^2))+0.5*log(L/U)/r),"
            " 0); U=r+b2; L=max(a1, D); D=abs(r-b2)",
            PAIR,
        ),
        ("B", "1/(1/a-tanh(p-0.8*p^2+4.85*p^3)/(a+0.9)); p=0.1*I*a", SINGLE),
    ),
    (
        ("-k*t^2/B+l*(a+0.14)^2*(a/B)^6", SINGLE),
        ("-k*t1*t2/f; f=sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))", PAIR),
    ),
)
CHAIN = (
    (
        ("u", "a1*b2^2*exp(-k*r)+t1", EVERY),
        ("v", "u1*u2/(1+r^2)+sin(u2)*a1", PAIR),
        ("w", "v*a+x*u-y^2+l", SINGLE),
    ),
    (("w*z+v", SINGLE), ("u1*w2*r+a2", PAIR), ("v1^2*cos(v2-r)*l", EVERY)),
)
BRANCHES = (
    (
        ("u", "select(step(r-0.5), sqrt(r-0.5), min(a1, 1/t2^2))+max(r, 0.4)*k", PAIR),
        ("c", "2*a", SINGLE),
        ("one", "1", PAIR),
    ),
    (("max(u1, u2)*c1+abs(t1-t2)/r+one1", PAIR), ("select(t, u/t, u)", SINGLE)),
)
MODELS = {"obc": OBC, "chain": CHAIN, "branches": BRANCHES}


def gb_term(model, method, dtype=torch.float64, *, n=N, tables=None):
    values, terms = MODELS[model] if isinstance(model, str) else model
    return CustomGB(
        parameters(n, dtype),
        n_particles=n,
        computed_values=[Step(name=v, expression=e, computation=c) for v, e, c in values],
        energy_terms=[Step(expression=e, computation=c) for e, c in terms],
        exclusions=torch.tensor([[0, 1], [7, 3]]),
        global_names=GLOBALS,
        tables=tables,
        **METHODS[method],
    )


# Comparison -----------------------------------------------------------------------------------


def serves(term, x):
    every = term._compiled if isinstance(term._compiled, list) else [term._compiled]
    size = {} if isinstance(term, CustomGB) else {"n_items": 1}
    return all(one is None or one.serve(x, **size) for one in every)


def derivatives(term, n_frames=3, *, order=2, x=None):
    """Energies, all gradients, and of products with them up to the order."""
    own = {k: p.detach() for k, p in term.parameter_values().items()}
    dtype = next(iter(own.values())).dtype
    x = (places(dtype) if x is None else x)[:n_frames]
    shared = {"k": torch.tensor(0.7, dtype=dtype), "l": torch.tensor(1.3, dtype=dtype)}
    named = {"x": x, "h": boxes(dtype)[: len(x)], **own, **shared}
    inputs = {name: t.clone().requires_grad_() for name, t in named.items()}
    energies = term(
        inputs["x"],
        inputs["h"] if term.periodic else None,
        {name: inputs[name] for name in own},
        {name: inputs[name] for name in shared},
    )
    generator = torch.Generator().manual_seed(1)
    results, outputs = [energies], [energies]
    for k in range(order):
        weights = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        total = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
        outputs = torch.autograd.grad(
            total,
            list(inputs.values()),
            create_graph=k + 1 < order,
            allow_unused=True,
            materialize_grads=True,
        )
        results += outputs
    return results


def compiled(term, *args, **options):
    with compiled_from(0):
        assert serves(term, places(torch.float64))
        return derivatives(term, *args, **options)


def plain(term, *args, **options):
    with mdgraft.plain_kernels():
        return derivatives(term, *args, **options)


def assert_same(found, expected, rtol=1e-10):
    # What cancels in one derivative is as large as others.
    scale = 1.0
    for one, other in zip(found, expected, strict=True):
        scale = max(scale, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * scale)


# Items ----------------------------------------------------------------------------------------

ITEMS = (
    ("bond", "k*(r-a)^2+l*b*(r-a)^3"),
    ("bond", "a*(1-exp(-b*(r-0.4)))^2"),
    ("bond", "a/r^12-b/r^6+k*log(r)*t"),
    ("bond", "select(step(r-0.6), b*sqrt(r-0.6), sqrt(0.6-r))+min(1/t^2, r)"),
    ("bond", "0.5*k*max(0, abs(r-a)-0.1)^2"),
    ("bond", "a*k"),
    ("bond", "3"),
    ("angle", "0.5*k*(theta-a)^2+b*theta^4"),
    ("angle", "a*(cos(theta)-cos(b))^2/sin(theta)^2"),
    ("angle", "0.5*a*dt^2*step(abs(dt)-0.1); dt=theta-b"),
    ("torsion", "0.5*a*min(dt, 2*pi-dt)^2*k; dt=abs(theta-b); pi=3.1415926535"),
    ("torsion", "a*(1+cos(2*theta-b))+l*cos(theta)^3*t"),
    ("torsion", "theta"),
    ("compound", "a*(distance(p1,p2)-b)^2*cos(angle(p3,p2,p1))+k*dihedral(p1,p2,p4,p5)"),
    ("compound", "a*angle(p1,p2,p3)*angle(p3,p2,p4)/distance(p2,p3)+distance(p3,p2)*l"),
    ("compound", "a*(x1-x2)^2*k+distance(p1,p2)*y3*z1+x1^2*t"),
    ("external", "a*(x-b)^2+k*sin(y)*z+t"),
    ("external", "k*max(0, sqrt(x^2+y^2)-a)^2+l*abs(z)"),
    ("centroid", "a*(distance(g1,g2)-b)^2+k*angle(g1,g2,g3)*t+x2*y1"),
)


@pytest.mark.parametrize("place", range(len(ITEMS)), ids=lambda k: f"{k}-{ITEMS[k][0]}")
def test_items(place):
    """Value, first and second derivatives in everything, by frame and by item."""
    kind, text = ITEMS[place]
    term = item_term(kind, text, periodic=place % 2 == 0)
    for n_frames in (1, MANY):
        assert_same(compiled(term, n_frames), plain(term, n_frames))


@pytest.mark.parametrize("place", [0, 8, 11, 15, 16], ids=lambda k: ITEMS[k][0])
def test_settings_of_items(place):
    """Open and periodic, three frames and none; single precision; copies."""
    for periodic in (False, True):
        term = item_term(*ITEMS[place], periodic=periodic)
        assert_same(compiled(term, 3, order=1), plain(term, 3, order=1))
    assert compiled(term, 0)[0].shape == (0,)
    single = item_term(*ITEMS[place], torch.float32)
    assert_same(compiled(single, order=1), plain(single, order=1), 1e-4)
    expected = plain(term, order=1)
    assert_same(compiled(copy.deepcopy(term), order=1), expected)
    assert_same(compiled(pickle.loads(pickle.dumps(term)), order=1), expected)


def degenerate(width):
    """Coincident, collinear and nearly collinear particles in four frames of four particles."""
    x = torch.tensor([[0.0, 0, 0], [0.3, 0, 0], [0.6, 0, 0], [0.9, 0.1, 0.2]]).double()
    frames = [x, x.clone(), x.clone(), x.clone()]
    frames[1][1] = frames[1][0]
    frames[2][2] = 0.0
    frames[3][2, 1] = 1e-9
    return torch.stack(frames), torch.arange(width)[None]


@pytest.mark.parametrize(
    ("width", "text"),
    [(2, "k*(r-a)^2"), (2, "r^2+cos(r)"), (3, "(theta-a)^2"), (3, "cos(theta)"), (4, "theta*a")],
)
def test_degenerate_geometry(width, text):
    """Where there is no coordinate, values and derivatives are those of plain torch."""
    x, particles = degenerate(width)
    values = {"a": torch.tensor([0.3]).double()}
    term = CustomBonded(text, particles, values, global_names=GLOBALS)
    expected = plain(term, 4, order=1, x=x)
    assert all(t.isfinite().all() for t in expected)
    assert_same(compiled(term, 4, order=1, x=x), expected)
    for frame in range(3):
        found, expected = (f(term, 1, x=x[frame:]) for f in (compiled, plain))
        assert_same(found, expected)


def test_what_stays_plain():
    """Tables, functions of points, few items in few frames."""
    x = places(torch.float64)[:3]
    few = item_term(*ITEMS[0])
    assert few.framewise
    assert not few._compiled.serve(x, 3)
    with mdgraft.plain_kernels():
        assert not few.framewise
    assert not item_term("centroid", ITEMS[-1][1]).framewise
    table = {"f": (ContinuousTable((5,), ((0.0, 2.0),)), torch.arange(5.0).double())}
    texts = {"f(a)": table, "pointdistance(x1,y1,z1,a,b,k)": None}
    for text, tables in texts.items():
        term = CustomCompoundBond(
            text, items(2), parameters(11, torch.float64), global_names=GLOBALS, tables=tables
        )
        with compiled_from(0):
            assert not term.framewise
            assert not term._compiled.serve(x, 100)
    unused = CustomCompoundBond(
        "a*distance(p1,p2)",
        items(2),
        parameters(11, torch.float64),
        global_names=GLOBALS,
        tables=table,
    )
    assert_same(compiled(unused), plain(unused))


# GB -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_frames", [1, MANY])
@pytest.mark.parametrize("method", METHODS)
def test_obc(method, n_frames):
    term = gb_term("obc", method)
    assert_same(compiled(term, n_frames), plain(term, n_frames))


@pytest.mark.parametrize(
    ("model", "method", "n_frames"),
    [("chain", "open", 3), ("chain", "periodic", MANY), ("branches", "cutoff", MANY)]
    + [("branches", "open", 1)],
)
def test_models(model, method, n_frames):
    """Values of values, expressions that are not symmetric, branches, excluded pairs or not."""
    term = gb_term(model, method)
    assert_same(compiled(term, n_frames), plain(term, n_frames))


def test_precision_and_copies():
    single = gb_term("obc", "cutoff", torch.float32)
    assert_same(compiled(single, order=1), plain(single, order=1), 1e-4)
    term = gb_term("obc", "open")
    compiled(term, 1, order=1)
    expected = plain(term, 1, order=1)
    assert_same(compiled(copy.deepcopy(term), 1, order=1), expected)
    assert_same(compiled(pickle.loads(pickle.dumps(term)), 1, order=1), expected)


def test_tables_and_compiled_steps():
    """Each step is compiled or not."""
    table = {"f": (ContinuousTable((9,), ((0.0, 4.0),)), torch.arange(9.0).double().sin())}
    model = (
        (("u", "f(r)*a2+t1", PAIR), ("v", "u2*exp(-r)", PAIR)),
        (("u1*v2+v1*u2", PAIR), ("f(r)*u1*u2", PAIR)),
    )
    term = gb_term(model, "open", tables=table)
    with compiled_from(0):
        x = places(torch.float64)
        assert [one.serve(x) for one in term._compiled] == [False, True, True, False]
        found = derivatives(term)
    assert_same(found, plain(term))


def test_size():
    """Few particles are worth while in many frames."""
    for n, n_frames, expected in ((14, 1, True), (9, 1, False), (9, 2000, True)):
        term = gb_term("obc", "open", n=n)
        x = places(torch.float64, n)[:1].expand(n_frames, n, 3)
        shared = {name: torch.tensor(1.0).double() for name in GLOBALS}
        with torch.no_grad():
            term(x, None, term.parameter_values(), shared)
        assert all(bool(c._kernels) is expected for c in term._compiled if c is not None)


# Both -----------------------------------------------------------------------------------------

EITHER = {
    "obc": lambda: gb_term("obc", "open"),
    "chain": lambda: gb_term("chain", "cutoff"),
    "angle": lambda: item_term("angle", ITEMS[7][1]),
    "torsion": lambda: item_term("torsion", ITEMS[11][1]),
    "external": lambda: item_term("external", ITEMS[-2][1]),
    "centroid": lambda: item_term("centroid", ITEMS[-1][1]),
}


@pytest.mark.parametrize("name", ["chain", "torsion"])
def test_third_derivatives(name):
    term = EITHER[name]()
    assert_same(compiled(term, 2, order=3), plain(term, 2, order=3), 1e-8)


@pytest.mark.parametrize("name", ["obc", "angle"])
def test_mapped(name):
    """Batches of positions and of parameters, in reverse and forward mode."""
    term, x = EITHER[name](), places(torch.float64)
    own = {k: p.detach() for k, p in term.parameter_values().items()}
    shared = {"k": torch.tensor(0.7).double(), "l": torch.tensor(1.3).double()}

    def energy(x, a):
        return term(x[None], None, own | {"a": a}, shared).sum()

    def slope(x, a):
        return torch.func.jvp(energy, (x, a), (x.cos(), a.sin()))[1]

    batch = torch.stack([own["a"] * (1 + 0.01 * k) for k in range(5)])
    functions = (energy, torch.func.grad(energy, argnums=(0, 1)), slope, torch.func.grad(slope))
    for dims in ((0, None), (0, 0)):
        arguments = (x[:5], batch[0] if dims[1] is None else batch)
        for function in functions if dims[1] is None else functions[:2]:
            mapped = torch.func.vmap(function, in_dims=dims)
            with mdgraft.plain_kernels():
                expected = mapped(*arguments)
            with compiled_from(0):
                found = mapped(*arguments)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", EITHER)
def test_derivatives_of_each_frame(name):
    term = EITHER[name]()
    potential = Potential(
        {"custom": term},
        n_particles=N,
        global_parameters={"k": torch.tensor(0.7).double(), "l": torch.tensor(1.3).double()},
    )
    names = [name for name, _ in potential.named_parameters()]
    frames = Frames(positions=places(torch.float64), sampled="NVT")
    with mdgraft.plain_kernels():
        expected = frame_derivatives(potential, frames, names)
    with compiled_from(0):
        assert potential.framewise is (name != "centroid")
        found = frame_derivatives(potential, frames, names)
    parts = ("energies", "forces", "gradients")
    assert_same([getattr(found, p) for p in parts], [getattr(expected, p) for p in parts])


# The chain rule, backwards --------------------------------------------------------------------


def evaluated(roots, inputs):
    """Formulas by numpy, without compiling them."""
    functions = {
        **{name: getattr(np, name) for name in ("add", "subtract", "multiply", "divide")},
        **{name: getattr(np, name) for name in ("negative", "sqrt", "log", "less", "less_equal")},
        **{"rsqrt": lambda x: 1 / np.sqrt(x), "select": np.where},
    }
    found = {}
    for node in topological(roots):
        if node.operation == "constant":
            found[node.index] = np.float64(node.payload)
        elif node.operation == "input":
            found[node.index] = inputs[node.payload]
        else:
            arguments = [found[a.index] for a in node.arguments]
            found[node.index] = functions[node.operation](*arguments)
    return [found[root.index] for root in roots]


def nested(g, x, y):
    """Singular parts that are used in one branch, in both, and in branches within branches."""
    root, inverse = g.sqrt(x), 1 / y
    first = g.select(x > 0, root * inverse, x * y)
    second = g.select(y > 0, g.select(x > 0, g.apply("log", x) + first, y * y), inverse * x)
    return [
        g.select(x > 0, root, 1.0),
        g.select(x > 0, root, -g.sqrt(-x)),
        first,
        second,
        g.larger(g.larger(first, second), g.smaller(x, y)) * second,
        g.select(x > 0, root, y) * g.select(y > 0, g.sqrt(y), x) + x * y,
    ]


@pytest.mark.parametrize("place", range(6))
def test_backwards_is_forwards(place):
    """Branches that are not taken do not matter, whatever their derivatives."""
    graph = Graph()
    x, y = graph.input("x"), graph.input("y")
    root = nested(graph, x, y)[place]
    values = np.array([-2.0, -0.5, 0.3, 1.7])
    inputs = dict(zip("xy", (a.ravel() for a in np.meshgrid(values, values)), strict=True))
    with np.errstate(all="ignore"):
        found = evaluated(reverse_gradient(root, [x, y]), inputs)
        expected = evaluated(gradient(root, [x, y]), inputs)
    for one, other in zip(found, expected, strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
