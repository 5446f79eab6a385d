"""Expressions by themselves: depth, copies, branches and singular points."""

from __future__ import annotations

import copy
import math
import pickle
import sys

import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft.lepton import ContinuousTable, Expression
from torch import Tensor


def at(text: str, x: float, **functions: int) -> tuple[float, float]:
    """Value and derivative at one point."""
    point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = Expression(text, variables=["x"], functions=functions)({"x": point})
    if not value.requires_grad:
        return value.item(), 0.0
    return value.item(), torch.autograd.grad(value, point)[0].item()


def nested_minimum(depth: int) -> str:
    text = "9"
    for i in range(depth):
        text = f"min(sqrt((x-{i})^2+0.25), {text})"
    return text


@pytest.mark.parametrize(
    ("text", "value", "slope"),
    [
        ("+".join(["x*0.5"] * 3000), 1500 * 0.3, 1500.0),
        ("-" * 3001 + "x", -0.3, -1.0),
        ("(" * 3000 + "x" + ")" * 3000, 0.3, 1.0),
        ("abs(" * 1500 + "x" + ")" * 1500, 0.3, 1.0),
        # Each level has the one below in both branches, or twice in one.
        (nested_minimum(60), math.sqrt(0.34), 0.3 / math.sqrt(0.34)),
        ("m40" + "".join(f";m{i}=min(m{i - 1}, 9/m{i - 1})" for i in range(40, 0, -1)) + ";m0=x",)
        + (0.3, 1.0),
    ],
    ids=["sum", "minus", "parentheses", "calls", "minimum", "shared"],
)
def test_depth(text, value, slope):
    assert at(text, 0.3) == pytest.approx((value, slope), rel=1e-12)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_copy_keeps_its_branches_apart(duplicate):
    expression = duplicate(Expression("select(step(x), sqrt(x), 0)", variables=["x"]))
    x = torch.tensor([-1.0, 4.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(expression({"x": x}).sum(), x)
    assert gradient.tolist() == [0.0, 0.25]


@pytest.mark.parametrize(
    "text",
    [
        "select(step(x), sqrt(x)*f(x), f(3-x))",
        "select(step(x), f(log(x)), f(3-x))",
        # One part is in use with and without the branch.
        "select(step(x), sqrt(s)+f(s), f(3-x)) + 0.1*s^2; s = x*f(x)^2",
        "min(1/x, x*f(x)) + f(x)",
    ],
)
def test_tables_in_branches_that_are_not_taken(text):
    table = ContinuousTable((5,), ((-2.0, 4.0),))
    expression = Expression(text, variables=["x"], functions={"f": 1})

    def energies(x: Tensor, entries: Tensor) -> Tensor:
        return expression({"x": x}, {"f": lambda argument: table(entries, argument)}).sum()

    x = torch.tensor([-1.5, -0.3, 0.7, 2.9], dtype=torch.float64, requires_grad=True)
    entries = torch.tensor([0.3, -1.0, 2.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(energies, (x, entries))
    assert torch.autograd.gradgradcheck(energies, (x, entries))


def test_a_table_outside_of_its_range_in_one_argument():
    table = ContinuousTable((3, 3), ((-1.0, 1.0), (-1.0, 1.0)))
    x = torch.tensor([-0.5, 0.5], dtype=torch.float64, requires_grad=True)
    outside = torch.full_like(x, 2.0)
    entries = torch.arange(9.0, dtype=torch.float64)
    value = table(entries, torch.log(x), outside)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.tolist() == [0, 0]
    assert gradient.tolist() == [0, 0]
    assert table(entries, torch.log(x), 0 * outside).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "value", "slope"),
    [
        ("x*(1/x)", 1.0, 0.0),
        ("x*recip(x)", 1.0, 0.0),
        ("-x*(1/x)", -1.0, 0.0),
        ("(x+0)/(1*x)", 1.0, 0.0),
        ("(2*x)/(x/0.5)", 1.0, 0.0),
        ("3/(1/x)", 0.0, 3.0),
        ("sqrt((-x)*(-x))", 0.0, 1.0),
        ("square(sqrt(2*x-x*3))", 0.0, -1.0),
        ("(x-1)/(-1+x)", 1.0, 0.0),
        ("0^0", 1.0, 0.0),
        ("(x-x)^0", 0.0, 0.0),
        ("(0*x)/(x-x)", 1.0, 0.0),
    ],
)
def test_what_openmm_simplifies_has_no_singularity(text, value, slope):
    assert at(text, 0.0) == (value, slope)


def test_numbers_are_those_of_a_stream():
    numbers = {"1e2.5": 100.0, "1e2.": 100.0, "1e": 0.0, ".": 0.0, "1e+": 0.0, "1.5E-1": 0.15}
    numbers["1e400"] = sys.float_info.max
    for text, value in numbers.items():
        assert at(text, 0.0)[0] == value, text


def test_a_name_that_drops_out_need_not_be_known():
    """But functions of particles make OpenMM look at all names."""
    for text in ("x+0*y", "y/y", "1^y", "x;y=z", "select(y, 2, 2)"):
        Expression(text, variables=["x"])
    with pytest.raises(InvalidInputError, match="unknown variable 'y'"):
        Expression("x+0*y", variables=["x"], geometry={"distance": 2})
    with pytest.raises(InvalidInputError, match="unknown variable 'y'"):
        Expression("select(1, x, y)", variables=["x"])
