"""Lepton's operators and functions on tensors, with Lepton's choice of one-sided derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Operations whose derivative can be infinite or undefined where the value is not used.
SINGULAR = frozenset(
    {"/", "^", "recip", "sqrt", "log", "asin", "acos", "atan2", "sec", "csc", "tan", "cot", "exp"}
    | {"sinh", "cosh"}
)


def _step(x: Tensor) -> Tensor:
    return (x >= 0).to(x.dtype)


def _delta(x: Tensor) -> Tensor:
    return (x == 0).to(x.dtype)


def _absolute(x: Tensor) -> Tensor:
    # Lepton's derivative at zero is one.
    return torch.where(x >= 0, x, -x)


def _power(base: Any, exponent: Any) -> Tensor:
    result: Tensor = torch.pow(base, exponent)
    return result


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": _power,
    "negate": lambda a: -a,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "log": torch.log,
    "sin": torch.sin,
    "cos": torch.cos,
    "sec": lambda a: 1 / torch.cos(a),
    "csc": lambda a: 1 / torch.sin(a),
    "tan": torch.tan,
    "cot": lambda a: 1 / torch.tan(a),
    "asin": torch.asin,
    "acos": torch.acos,
    "atan": torch.atan,
    "atan2": torch.atan2,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "step": _step,
    "delta": _delta,
    "square": lambda a: a * a,
    "cube": lambda a: a * a * a,
    "recip": lambda a: 1 / a,
    "abs": _absolute,
    "floor": torch.floor,
    "ceil": torch.ceil,
}
