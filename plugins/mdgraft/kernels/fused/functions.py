"""Functions for all lanes of a vector at a time.

Ranges are reduced and what is left is a polynomial (`coefficients`). Results are within a few units
in the last place, for all numbers that there are; special values are those of C99. Sines of huge
numbers are left to the C library, in a branch that is hardly ever taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mdgraft.kernels.fused import error_functions, exponentials, trigonometry
from mdgraft.kernels.fused.arithmetic import Format, Mask, Real, Value


class Target(Protocol):
    """Where functions are emitted to."""

    #: What functions of the same argument have in common.
    shared: dict[Any, Any]

    @property
    def form(self) -> Format:
        """Of its numbers."""

    def corrected(self, mask: Mask, usual: Real, name: str, arguments: Sequence[Value]) -> Real:
        """The usual numbers, except where the mask, hardly ever, wants the library's function."""


_FUNCTIONS: Mapping[str, Callable[..., Real]] = {
    "exp": exponentials.exp,
    "log": exponentials.log,
    "sinh": exponentials.sinh,
    "cosh": exponentials.cosh,
    "tanh": exponentials.tanh,
    "pow": exponentials.pow,
    "erf": error_functions.erf,
    "erfc": error_functions.erfc,
    "atan": trigonometry.atan,
    "atan2": trigonometry.atan2,
    "asin": trigonometry.asin,
    "acos": trigonometry.acos,
}
_OF_ANGLES: Mapping[str, Callable[[trigonometry.Angle], Real]] = {
    "sin": trigonometry.sin,
    "cos": trigonometry.cos,
    "tan": trigonometry.tan,
}


def emit_function(emitter: Target, name: str, arguments: Sequence[Value]) -> Value | None:
    """Emit a function of `DERIVATIVES`; None if there is no code for vectors of it."""
    form = emitter.form
    reals = [Real(form, argument) for argument in arguments]
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](*reals).value
    if name in _OF_ANGLES:
        key = ("angle", arguments[0])
        angle = emitter.shared.get(key)
        if angle is None:
            angle = emitter.shared[key] = trigonometry.reduced(*reals)
        return emitter.corrected(angle.huge, _OF_ANGLES[name](angle), name, arguments).value
    return None
