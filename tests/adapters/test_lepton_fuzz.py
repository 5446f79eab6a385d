"""Random Lepton expressions: what OpenMM makes of them, and what mdgraft does."""

import functools
import math
import random

import numpy as np
import openmm
import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft.lepton import ContinuousTable, DiscreteTable, Expression
from mdgraft.lepton.syntax import FUNCTIONS, Constant

NAMES = ("x1", "y1", "z1", "lambda", "if", "k")
GLOBALS = {"lambda": 0.7, "if": -1.3, "k": 2.0}
RNG = np.random.default_rng(11)
TABLES = {
    "table": (ContinuousTable((9,), ((-2.0, 3.0),)), RNG.normal(size=9)),
    "plane": (ContinuousTable((4, 5), ((-2.0, 2.0), (-1.0, 3.0))), RNG.normal(size=20)),
    "entry": (DiscreteTable((4,)), RNG.normal(size=4)),
    # Hides the function of the language.
    "sinh": (ContinuousTable((6,), ((-3.0, 3.0),)), RNG.normal(size=6)),
}
ARITIES = FUNCTIONS | {name: table.arguments for name, (table, _) in TABLES.items()}


def write(rng, names, depth):
    """A random expression."""
    kind = rng.random()
    if depth == 0 or kind < 0.12:
        return rng.choice([rng.choice(names), rng.choice(names), number(rng)])
    space = rng.choice(["", "", "", " ", "\t ", "\n"])
    if kind < 0.6:
        operator = rng.choice("+-*/^+-*")
        left = write(rng, names, depth - 1)
        if operator == "^":
            exponent = rng.choice(["2", "3", "-1", "-2", "0.5", "1", "k", "-k", "2.0", "4"])
            if "k" in exponent:
                # The derivative holds the logarithm of the base.
                return f"(0.3+abs({left})){space}^{space}{exponent}"
            return f"{left}{space}^{exponent}"
        return f"{left}{space}{operator}{space}{write(rng, names, depth - 1)}"
    if kind < 0.68:
        return f"-{space}{write(rng, names, depth - 1)}"
    if kind < 0.78:
        return f"({space}{write(rng, names, depth - 1)}{space})"
    name = rng.choice(list(ARITIES))
    arguments = [write(rng, names, depth - 1) for _ in range(ARITIES[name])]
    return f"{name}({f'{space},'.join(arguments)})"


def number(rng):
    # No zeros: OpenMM would fold what they multiply, and may never end.
    value = rng.choice([rng.uniform(0.1, 3), rng.randint(1, 5), rng.uniform(1e-3, 1e-2)])
    style = rng.choice(["{:.4f}", "{:.2e}", "{:.2E}", "{:.4g}"])
    return style.format(value).replace("0.", rng.choice(["0.", "."]), 1)


def with_definitions(rng):
    """An expression of names, some of which later definitions give."""
    names = list(NAMES)
    definitions = []
    for i in range(rng.choice([0, 0, 1, 2])):
        name = rng.choice([f"t{i}", "y1", "a.b", "é"])
        definitions.append(f" {name} = {write(rng, names, 1)}")
        names.append(name)
    return ";".join([write(rng, names, 3), *definitions[::-1]]) + rng.choice(["", "", ";", " ; "])


ACCEPTED = {name: table.arguments for name, (table, _) in TABLES.items()}
CALLABLE = {
    name: functools.partial(table, torch.tensor(entries))
    for name, (table, entries) in TABLES.items()
}


def refusal(text):
    """Why an expression is refused, or None."""
    try:
        # As in a CustomCompoundBondForce, where even a name that drops out must be known.
        Expression(text, variables=NAMES, functions=ACCEPTED, geometry={"distance": 2})
    except InvalidInputError as error:
        return error
    return None


def hangs_openmm(text):
    """Whether a constant part is not finite: simplifying NaN, OpenMM never comes to an end."""
    try:
        steps = Expression(text, variables=NAMES, functions=ACCEPTED).program.steps
    except InvalidInputError:
        return False
    return any(isinstance(s, Constant) and not math.isfinite(s.value) for s in steps)


def by_openmm(text, points):
    """Energy, its gradient and the derivatives in the globals at each point; or None."""
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomCompoundBondForce(1, text)
    for name, value in GLOBALS.items():
        force.addGlobalParameter(name, value)
        force.addEnergyParameterDerivative(name)
    for name, (table, entries) in TABLES.items():
        bounds = [x for pair in getattr(table, "limits", ()) for x in pair]
        kind = "Continuous" if bounds else "Discrete"
        cls = getattr(openmm, f"{kind}{table.arguments}DFunction")
        sizes = table.sizes if table.arguments > 1 else ()
        force.addTabulatedFunction(name, cls(*sizes, entries.tolist(), *bounds))
    force.addBond([0], [])
    system.addForce(force)
    try:
        context = openmm.Context(
            system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
        )
    except openmm.OpenMMException:
        return None
    rows = []
    for point in points:
        context.setPositions([point])
        state = context.getState(energy=True, forces=True, parameterDerivatives=True)
        forces = state.getForces(asNumpy=True)._value[0]
        slopes = state.getEnergyParameterDerivatives()
        rows.append(
            [state.getPotentialEnergy()._value, *-forces, *(slopes[name] for name in GLOBALS)]
        )
    return np.array(rows)


def by_mdgraft(text, points):
    expression = Expression(text, variables=NAMES, functions=ACCEPTED)
    columns = [torch.tensor(points[:, c].copy(), requires_grad=True) for c in range(3)]
    shared = [torch.full((len(points),), v, dtype=torch.float64) for v in GLOBALS.values()]
    inputs = dict(zip(NAMES, [*columns, *(s.requires_grad_() for s in shared)], strict=True))
    value = expression(inputs, CALLABLE).expand(len(points))
    gradient = [torch.zeros(len(points))] * len(NAMES)
    if value.requires_grad:
        gradient = torch.autograd.grad(
            value.sum(), list(inputs.values()), allow_unused=True, materialize_grads=True
        )
    return torch.stack([value, *gradient], dim=-1).detach().numpy()


@pytest.mark.parametrize("seed", range(8))
def test_random_expressions(seed):
    rng = random.Random(seed)
    points = np.random.default_rng(seed).uniform(-2, 2, size=(3, 3))
    compared = 0
    for _ in range(250):
        text = with_definitions(rng)
        if hangs_openmm(text):
            continue
        expected = by_openmm(text, points)
        if expected is None:
            with pytest.raises(InvalidInputError):
                Expression(text, variables=NAMES, functions=ACCEPTED)
            continue
        found = by_mdgraft(text, points)
        # What rounding does to the input shows how much rounding can do to the result.
        nearby = by_openmm(text, points * (1 + 1e-13))
        with np.errstate(invalid="ignore", over="ignore"):
            noise = np.abs(nearby - expected)
            scale = np.maximum(1.0, np.abs(expected).max(axis=1, keepdims=True))
            wrong = np.abs(found - expected) > 1e-11 * scale + 10 * noise
        comparable = np.isfinite(expected) & np.isfinite(noise) & (scale < 1e12)
        # A derivative that is infinite somewhere inside is beyond comparison.
        comparable &= np.isfinite(expected).all(axis=1, keepdims=True)
        wrong |= ~np.isfinite(found)
        assert not (wrong & comparable).any(), (
            f"{text!r}\nat {points.tolist()}\nOpenMM {expected.tolist()}\nmdgraft {found.tolist()}"
        )
        compared += int(comparable.all(axis=1).sum())
    assert compared > 300


@pytest.mark.parametrize("seed", range(4))
def test_mutilated_expressions(seed):
    """Accepted and refused exactly as OpenMM does."""
    rng = random.Random(100 + seed)
    points = np.array([[0.3, -0.4, 1.1]])
    refused = 0
    for _ in range(400):
        text = list(with_definitions(rng))
        for _ in range(rng.choice([1, 1, 2])):
            place = rng.randrange(len(text) + 1)
            change = rng.choice("()+-*/^,;= .e1x'é")
            if rng.random() < 0.5 and place < len(text):
                text[place] = rng.choice(["", change])
            else:
                text.insert(place, change)
        text = "".join(text)
        if hangs_openmm(text):
            continue
        accepted = by_openmm(text, points) is not None
        error = refusal(text)
        assert accepted == (error is None), f"{text!r}: OpenMM accepts it: {accepted}; {error}"
        refused += not accepted
    assert 100 < refused < 390
