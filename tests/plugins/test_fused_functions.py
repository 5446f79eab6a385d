"""Functions of vectors in compiled loops: accuracy, special values, derivatives."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from llvmlite import ir
from mdgraft.kernels.fused import jit
from mdgraft.kernels.fused.emit import Emitter
from mdgraft.kernels.fused.graph import Graph, Node, gradient, reverse_gradient, tangents

DTYPES = (np.float32, np.float64)


def compiled_map(
    n_inputs: int, formulas: Callable[..., Sequence[Node]], dtype: type, lanes: int | None = None
) -> Callable[..., list[np.ndarray]]:
    """A function of arrays that evaluates formulas of one number of each, many at a time."""
    graph = Graph()
    inputs = [graph.input(f"x{k}") for k in range(n_inputs)]
    roots = formulas(graph, *inputs)
    double = dtype is np.float64
    scalar = ir.DoubleType() if double else ir.FloatType()
    lanes = lanes or jit.lanes(np.dtype(dtype).itemsize)
    index, pointer = ir.IntType(64), scalar.as_pointer()
    module = ir.Module("test")
    n_arrays = n_inputs + len(roots)
    function = ir.Function(
        module, ir.FunctionType(ir.VoidType(), [index] + [pointer] * n_arrays), "map"
    )
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    entry = builder.block
    body, after = builder.append_basic_block("body"), builder.append_basic_block("after")
    builder.branch(body)
    builder.position_at_end(body)
    k = builder.phi(index)
    k.add_incoming(index(0), entry)
    emitter = Emitter(builder, scalar, lanes, lambda series: ([], None, None))

    def place(array: Any) -> Any:
        return builder.bitcast(builder.gep(array, [k]), emitter.vector.as_pointer())

    size = np.dtype(dtype).itemsize
    arrays = function.args[1:]
    values = {f"x{j}": builder.load(place(arrays[j]), align=size) for j in range(n_inputs)}
    for array, value in zip(arrays[n_inputs:], emitter.formulas(roots, values), strict=True):
        builder.store(value, place(array), align=size)
    following = builder.add(k, index(lanes))
    k.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, function.args[0]), body, after)
    builder.position_at_end(after)
    builder.ret_void()
    attribute = f'"prefer-vector-width"="{8 * lanes * size}"'
    code = "\n".join(
        f"{line} {attribute}" if line.startswith("define ") else line
        for line in str(module).splitlines()
    )
    run = jit.compiled("map", code, [ctypes.c_int64] + [ctypes.c_void_p] * n_arrays)

    def evaluate(*arguments: np.ndarray) -> list[np.ndarray]:
        n = arguments[0].size
        padded = -(-n // lanes) * lanes
        full = [np.resize(np.asarray(a, dtype), padded) for a in arguments]
        out = [np.empty(padded, dtype) for _ in roots]
        run(padded, *(a.ctypes.data for a in (*full, *out)))
        return [a[:n] for a in out]

    return evaluate


@functools.cache
def function_of(name: str, dtype: type, lanes: int | None = None) -> Callable[..., np.ndarray]:
    n_inputs = 2 if name in ("pow", "atan2") else 1
    evaluate = compiled_map(n_inputs, lambda g, *x: [g.apply(name, *x)], dtype, lanes)
    return lambda *arguments: evaluate(*arguments)[0]


# Accuracy -------------------------------------------------------------------------------------

_REFERENCE: dict[str, Any] = {
    **{name: getattr(np, name) for name in ("exp", "log", "sin", "cos", "tan")},
    **{name: getattr(np, name) for name in ("sinh", "cosh", "tanh")},
    "atan": np.arctan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan2": np.arctan2,
    "pow": np.power,
}
#: Allowed errors in units in the last place.
_ULPS = {
    **dict.fromkeys(("exp", "log", "erf", "pow"), 1.5),
    **dict.fromkeys(("sin", "cos", "acos", "sinh", "cosh", "tanh"), 2.0),
    **dict.fromkeys(("atan", "atan2", "asin"), 2.5),
    **dict.fromkeys(("tan", "erfc"), 4.5),
}
#: Halfwidths of the intervals that are looked at closely.
_WIDTHS = {
    **dict.fromkeys(("exp", "sinh", "cosh"), (1.5, 30.0, 95.0, 750.0)),
    **dict.fromkeys(("sin", "cos", "tan"), (1.5, 10.0, 1e5, 2e9)),
    **dict.fromkeys(("erf", "erfc"), (0.7, 1.5, 5.0, 10.3, 28.0)),
    **dict.fromkeys(("asin", "acos"), (0.1, 1.0)),
    **dict.fromkeys(("log", "atan", "tanh"), (1.0, 2.0, 30.0)),
}


def _exact(name: str, *arguments: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        if name in _REFERENCE:
            return np.asarray(_REFERENCE[name](*(a.astype(np.longdouble) for a in arguments)))
        out = np.empty(arguments[0].shape, np.longdouble)
        with mpmath.workdps(40):
            # All that there is beyond is 1, -1 and 0.
            for k, x in enumerate(np.clip(arguments[0], -200, 200).tolist()):
                value = getattr(mpmath, name)(mpmath.mpf(x))
                out[k] = float(value)
                if math.isfinite(float(value)):
                    out[k] += np.longdouble(float(value - float(value)))
        return out


def _patterns(rng: np.random.Generator, dtype: type, n: int) -> np.ndarray:
    """All numbers that there are, with the same probability."""
    bits = np.int64 if dtype is np.float64 else np.int32
    return rng.integers(np.iinfo(bits).min, np.iinfo(bits).max, n, bits, endpoint=True).view(dtype)


def _samples(name: str, dtype: type) -> list[np.ndarray]:
    rng = np.random.default_rng(20)
    n = 3000 if name.startswith("erf") else 50_000
    if name == "atan2":
        sets = [rng.normal(size=(2, n)), np.exp(rng.normal(size=(2, n))) * [[1.0], [-1.0]]]
    elif name == "pow":
        near_one, large = 1 + rng.uniform(-1e-3, 1e-3, n), rng.uniform(-5e5, 5e5, n)
        sets = [np.stack([rng.uniform(0, 4, n), rng.uniform(-40, 40, n)])]
        sets += [np.stack([near_one, large])]
        sets += [np.stack([np.exp(rng.uniform(-80, 80, n)), rng.uniform(-9, 9, n)])]
        sets += [np.stack([rng.uniform(-4, 4, n), rng.integers(-40, 40, n)])]
    else:
        sets = [rng.uniform(-w, w, n)[None] for w in _WIDTHS[name]]
        sets += [(1 + rng.uniform(-0.5, 0.5, n) ** 3)[None]]
        if name in ("sin", "cos", "tan"):
            sets += [np.pi / 2 * np.arange(n)[None]]
    n_inputs = len(sets[0])
    patterns = np.stack([_patterns(rng, dtype, n) for _ in range(n_inputs)])
    return [*np.concatenate([*(s.astype(dtype) for s in sets), patterns], axis=1)]


def _assert_close(name: str, result: np.ndarray, exact: np.ndarray, *where: np.ndarray) -> None:
    dtype = result.dtype
    tiny = np.finfo(dtype).tiny
    with np.errstate(all="ignore"):
        rounded = exact.astype(dtype)
        error = np.abs(result.astype(np.longdouble) - exact)
        ulps = np.asarray(error / np.spacing(np.abs(rounded)).astype(np.longdouble))
        right = (result == rounded) | (np.isnan(result) & np.isnan(rounded))
        # An overflow one unit early is no error beyond that unit.
        right |= (ulps <= _ULPS[name]) | ((np.abs(exact) < tiny) & (error < tiny))
    assert right.all(), [
        (*(float(x[k]) for x in where), float(result[k]), float(exact[k]), float(ulps[k]))
        for k in np.flatnonzero(~right)[:5]
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _ULPS)
def test_errors_are_a_few_units_in_the_last_place(name: str, dtype: type) -> None:
    arguments = _samples(name, dtype)
    _assert_close(name, function_of(name, dtype)(*arguments), _exact(name, *arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _ULPS)
def test_special_values(name: str, dtype: type) -> None:
    limits = np.finfo(dtype)
    positive = [0.0, limits.smallest_subnormal, limits.tiny / 3, limits.tiny, limits.eps, 0.5, 1.0]
    positive += [1 + limits.eps, 2.0, 2.5, 3.0, 89.0, 104.0, 710.0, 1e5, 1e10, limits.max, np.inf]
    specials = np.array([*positive, *(-x for x in positive), np.nan], dtype)
    if name in ("pow", "atan2"):
        arguments = [x.ravel() for x in np.meshgrid(specials, specials)]
    else:
        arguments = [specials]
    result, exact = function_of(name, dtype)(*arguments), _exact(name, *arguments)
    _assert_close(name, result, exact, *arguments)
    if name in _REFERENCE:
        with np.errstate(all="ignore"):
            like = _REFERENCE[name](*arguments)
        zero = like == 0
        np.testing.assert_array_equal(np.signbit(result[zero]), np.signbit(like[zero]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_of_zero(dtype: type) -> None:
    zeros = np.array([0.0, -0.0], dtype)
    for name in ("sin", "tan", "atan", "asin", "sinh", "tanh", "erf"):
        result = function_of(name, dtype)(zeros)
        assert np.signbit(result).tolist() == [False, True] and not result.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lanes_do_not_depend_on_their_neighbours(dtype: type) -> None:
    rng = np.random.default_rng(3)
    x = rng.uniform(-20, 20, 64).astype(dtype)
    mixed = x.copy()
    mixed[::5] = 1e12
    kept = np.ones(64, bool)
    kept[::5] = False
    for name in ("sin", "cos", "tan"):
        usual, result = function_of(name, dtype)(x), function_of(name, dtype)(mixed)
        np.testing.assert_array_equal(result[kept], usual[kept])
        np.testing.assert_array_equal(result[0], result[~kept])


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_length_of_vectors(dtype: type, lanes: int) -> None:
    for name in ("exp", "log", "sin", "erfc", "pow"):
        rng = np.random.default_rng(4)
        arguments = [
            rng.uniform(0.1, 5, 64).astype(dtype) for _ in range(2 if name == "pow" else 1)
        ]
        np.testing.assert_array_equal(
            function_of(name, dtype, lanes)(*arguments), function_of(name, dtype)(*arguments)
        )


def test_functions_that_share_an_argument() -> None:
    def formulas(g: Graph, x: Node, y: Node) -> list[Node]:
        names = ("sin", "cos", "tan")
        return [g.apply(name, z) for z in (x, y) for name in names]

    rng = np.random.default_rng(5)
    x, y = rng.uniform(-9, 9, (2, 100))
    results = compiled_map(2, formulas, np.float64)(x, y)
    expected = [function_of(name, np.float64)(z) for z in (x, y) for name in ("sin", "cos", "tan")]
    np.testing.assert_array_equal(results, expected)


# Derivatives ----------------------------------------------------------------------------------

_DOMAIN = {"log": (0.1, 4.0), "asin": (-0.9, 0.9), "acos": (-0.9, 0.9), "pow": (0.2, 3.0)}


@pytest.mark.parametrize("name", _ULPS)
def test_derivatives_agree_with_torch(name: str) -> None:
    n_inputs = 2 if name in ("pow", "atan2") else 1

    def formulas(g: Graph, *inputs: Node) -> list[Node]:
        # Another function around it, so that the chain rule has something to do.
        value = g.apply(name, *inputs)
        energy = value * value + inputs[0] * value
        first = gradient(energy, inputs)
        change = {x: g.constant(0.5 + k) for k, x in enumerate(inputs)}
        return [energy, *first, *reverse_gradient(energy, inputs), *tangents(first, change)]

    rng = np.random.default_rng(6)
    arguments = rng.uniform(*_DOMAIN.get(name, (-2.0, 2.0)), (n_inputs, 200))
    results = compiled_map(n_inputs, formulas, np.float64)(*arguments)
    inputs = [torch.tensor(x, requires_grad=True) for x in arguments]
    value = getattr(torch, name)(*inputs)
    energy = value * value + inputs[0] * value
    first = torch.autograd.grad(energy.sum(), inputs, create_graph=True)
    along = sum((0.5 + k) * g.sum() for k, g in enumerate(first))
    assert isinstance(along, torch.Tensor)
    second = torch.autograd.grad(along, inputs)
    for result, expected in zip(results, [energy, *first, *first, *second], strict=True):
        scale = expected.abs().max().item()
        np.testing.assert_allclose(result, expected.detach(), rtol=1e-11, atol=1e-13 * scale)
