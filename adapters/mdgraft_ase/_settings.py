"""Settings of calculators, as ASE's calculators understand them."""

from __future__ import annotations

from typing import Any

import numpy as np
from mdgraft import SimulationError


def change_setting(calculator: Any, name: str, value: Any) -> None:
    """Set a parameter as ASE's calculators understand it, and have what depended on it forgotten.

    Raises
    ------
    SimulationError
        If the calculator refuses the value.
    """
    try:
        if hasattr(calculator, "set"):
            calculator.set(**{name: value})
        else:
            calculator.parameters[name] = value
    except Exception as error:
        raise SimulationError(
            f"{type(calculator).__name__}: the calculator refuses {name} = {value} "
            f"({type(error).__name__}: {error})"
        ) from error
    forget(calculator)


def forget(calculator: Any) -> None:
    """Have a calculator forget its last results."""
    if hasattr(calculator, "reset"):
        calculator.reset()
    else:
        calculator.atoms = None
        calculator.results = {}


def like(present: Any, value: np.ndarray) -> Any:
    """A number or array of the kind that a setting has."""
    if isinstance(present, np.ndarray):
        return value.astype(present.dtype)
    if isinstance(present, list | tuple):
        return type(present)(value.tolist())
    return float(value)


def is_numerical(value: Any) -> bool:
    """Whether a setting is a number or an array of floating-point type."""
    if isinstance(value, float | np.floating):
        return bool(np.isfinite(value))
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(entry, float | np.floating) for entry in value)
    if isinstance(value, np.ndarray):
        return bool(np.issubdtype(value.dtype, np.floating) and value.size > 0)
    return False
