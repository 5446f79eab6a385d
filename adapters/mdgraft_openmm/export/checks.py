"""Whether forces and slopes are derivatives of the energy, found out by its differences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from mdgraft import MDGraftWarning, NonConservativeForceWarning
from torch import Tensor

if TYPE_CHECKING:
    from mdgraft_openmm.export.evaluator import Evaluator

#: Displacement [nm] of a difference, and relative tolerance, by precision.
_STEPS = {
    torch.float64: (1e-4, 2e-3),
    torch.float32: (1e-3, 1e-2),
    torch.float16: (1e-2, 0.2),
    torch.bfloat16: (1e-2, 0.2),
}


def check_forces(
    evaluator: Evaluator, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
) -> None:
    """Warn if forces near a configuration are not the gradient of the energy.

    Differences of the energy along two directions, each half along the forces and half at
    random, are compared with the work of the forces; both must disagree, since a pair that
    crosses a cutoff without switching disturbs one.
    """
    try:
        found = [_along(evaluator, positions, box, values, seed) for seed in range(2)]
    except Exception:
        # Not every frame is one that the module accepts; if this one is none, it will tell.
        return
    if all(abs(change - predicted) > allowed for change, predicted, allowed in found):
        change, predicted, allowed = found[0]
        warnings.warn(
            "module: its forces are not the gradient of its energy. Along a direction in "
            f"which they say that the energy changes by {predicted:.6g} kJ/mol/nm it changes "
            f"by {change:.6g} kJ/mol/nm, with an error of at most {allowed:.2g}. Dynamics "
            "will not conserve energy; look for a detach(), no_grad() or rounding inside, or "
            "for forces that are predicted beside the energy",
            NonConservativeForceWarning,
            stacklevel=2,
        )


def _along(
    evaluator: Evaluator,
    positions: Tensor,
    box: Tensor | None,
    values: Mapping[str, float],
    seed: int,
) -> tuple[float, float, float]:
    """Change of the energy along a direction, what forces say, and the error allowed."""
    step, rtol = _STEPS[evaluator.function.dtype]
    random = torch.Generator("cpu").manual_seed(seed)
    like: Any = {"generator": random, "dtype": torch.float64, "device": "cpu"}
    noise = torch.randn(2, *positions.shape, **like)
    # Away from minima and symmetric places, where forces vanish whether right or wrong.
    start = positions.detach().to("cpu", torch.float64) + 20 * step * noise[0]
    forces = evaluator.evaluate(start, box, values).forces.to("cpu", torch.float64)
    along = noise[1] / noise[1].norm()
    if bool(forces.any()):
        along = along + forces / forces.norm()
    along = along / along.norm(dim=-1).max()

    def energy(t: float) -> float:
        return float(evaluator.evaluate(start + t * step * along, box, values).energy)

    near = {t: energy(t) for t in (-2, -1, 1, 2)}
    rough = (near[1] - near[-1]) / (2 * step)
    change = (4 * rough - (near[2] - near[-2]) / (4 * step)) / 3
    rounding = torch.finfo(evaluator.function.dtype).eps * max(map(abs, near.values())) / step
    scale = max(float(forces.norm() * along.norm()), abs(change))
    allowed = rtol * scale + 3 * abs(change - rough) + 30 * rounding
    return change, -float((forces * along).sum()), allowed


def check_slopes(
    evaluator: Evaluator, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
) -> None:
    """Warn if slopes are not the derivatives of the energy in global parameters.

    Parameters whose slope is zero are moved together, so that one that the module took out of
    the graph is not lost among others, and so are all others; one by one if that finds a
    difference.
    """
    if not evaluator.slopes:
        return
    slopes = {n: float(s) for n, s in evaluator.evaluate(positions, box, values).slopes.items()}
    wrong = []
    for chosen in (
        {n: s for n, s in slopes.items() if s == 0.0},
        {n: s for n, s in slopes.items() if s != 0.0 and math.isfinite(s)},
    ):
        if not chosen or _wrong(evaluator, positions, box, values, chosen, 1.0) is None:
            continue
        for name, slope in chosen.items():
            # A large step may meet something else, and a small one is lost in rounding.
            one = {name: slope}
            found = [_wrong(evaluator, positions, box, values, one, f) for f in (1.0, 0.01)]
            if None not in found:
                wrong.append(f"{name!r} ({slope:.6g} instead of about {found[0]:.6g} kJ/mol)")
    if wrong:
        warnings.warn(
            "module: its derivatives in some global parameters are not those of its energy: "
            f"{', '.join(wrong)}. Look for a detach(), float() or item() inside, or do without "
            "such derivatives by parameter_derivatives=False",
            MDGraftWarning,
            stacklevel=2,
        )


def _wrong(
    evaluator: Evaluator,
    positions: Tensor,
    box: Tensor | None,
    values: Mapping[str, float],
    slopes: Mapping[str, float],
    factor: float,
) -> float | None:
    """Slope of the energy along parameters, if their slopes say something else.

    At a kink, such as where a parameter is clamped, either side may be right.
    """
    step, rtol = _STEPS[evaluator.function.dtype]
    step *= 10 * factor
    # Not all alike, so that what is wrong cannot cancel.
    along = {name: (1 + i / 3) * step * (abs(values[name]) or 1.0) for i, name in enumerate(slopes)}

    def energy(t: int) -> float:
        moved = {name: values[name] + t * shift for name, shift in along.items()}
        try:
            return float(evaluator.evaluate(positions, box, {**values, **moved}).energy)
        except Exception:
            # Beyond what the module accepts.
            return math.nan

    near = {t: energy(t) for t in (-2, -1, 0, 1, 2)}
    rough = (near[1] - near[-1]) / 2
    changes = [(4 * rough - (near[2] - near[-2]) / 4) / 3]
    changes += [s * (4 * near[s] - near[2 * s] - 3 * near[0]) / 2 for s in (1, -1)]
    parts = [slopes[name] * shift for name, shift in along.items()]
    change = min(filter(math.isfinite, changes), key=lambda c: abs(c - sum(parts)), default=0.0)
    rounding = torch.finfo(evaluator.function.dtype).eps * max(map(abs, near.values()))
    scale = max(math.hypot(*parts), abs(change))
    allowed = rtol * scale + 3 * abs(changes[0] - rough) + 30 * rounding
    wrong = abs(change - sum(parts)) > allowed
    return change / sum(along.values()) if wrong else None
