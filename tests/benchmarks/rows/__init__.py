"""The rows of the table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

from timing import Result, Settings

from rows import constraints, export, frames, growth, montecarlo, single, startup, trajectory, water


@dataclasses.dataclass(frozen=True)
class Row:
    """How a row is measured, and which settings it depends on."""

    measure: Callable[[Settings], Iterator[Result]]
    per_dtype: bool = True
    on_gpu: bool = False


ROWS: dict[str, Row] = {
    **{
        name: Row(functools.partial(single.first_derivatives, name), on_gpu=True)
        for name in single.CASES
    },
    "hvp": Row(single.hessian_vector, on_gpu=True),
    "alanine-frames": Row(frames.alanine_frames),
    "water-ensemble": Row(water.water_ensemble),
    "finite-differences": Row(water.finite_differences),
    "verlet": Row(trajectory.verlet),
    "lists": Row(trajectory.lists, per_dtype=False),
    "growth": Row(growth.growth),
    "constraints": Row(constraints.constraints),
    "export": Row(export.export),
    "montecarlo": Row(montecarlo.montecarlo, per_dtype=False),
    "startup": Row(startup.startup, per_dtype=False),
}
