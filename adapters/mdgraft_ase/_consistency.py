"""Whether the gradients of a function are those of its energy."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from mdgraft import NonConservativeForceWarning

from mdgraft_ase._energy import EnergyFunction

#: Displacement [nm] of a difference, and relative tolerance, by precision.
_STEPS = {torch.float64: (1e-4, 2e-3), torch.float32: (1e-3, 1e-2)}
_COARSEST = (1e-2, 0.2)


def check_gradients(
    energy: EnergyFunction, positions: np.ndarray, box: np.ndarray | None, *, strain: bool
) -> None:
    """Warn if forces, or the stress, are not derivatives of the energy, as after a ``detach()``.

    Differences of the energy along two random directions, each with a random strain if ``strain``
    is true. Both must disagree, since a pair that crosses a cutoff without a switching function
    disturbs one.

    Parameters
    ----------
    energy
        What is checked.
    positions
        ``(N, 3)`` [nm].
    box
        ``(3, 3)`` [nm], or None.
    strain
        Whether the strain gradient is checked together with the forces.
    """
    found = [_along(energy, positions, box, strain, seed) for seed in range(2)]
    if all(abs(change - predicted) > allowed for change, predicted, allowed in found):
        change, predicted, allowed = found[0]
        what = "forces and stress" if strain else "forces"
        warnings.warn(
            f"potential: its {what} are not derivatives of its energy. Along a direction in which "
            f"they say that it changes by {predicted:.6g} kJ/mol/nm it changes by {change:.6g}, "
            f"with an error of at most {allowed:.2g}. Look for a detach(), no_grad() or a detour "
            "through NumPy inside",
            NonConservativeForceWarning,
            stacklevel=2,
        )


def _along(
    energy: EnergyFunction, positions: np.ndarray, box: np.ndarray | None, strain: bool, seed: int
) -> tuple[float, float, float]:
    """Change of the energy along a direction, what gradients say, and the error allowed."""
    dtype = energy.tensors(positions, None)[0].dtype
    step, rtol = _STEPS.get(dtype, _COARSEST)
    rng = np.random.default_rng(seed)
    # Away from minima and symmetric places, where forces vanish whether right or wrong.
    start = positions + 20 * step * rng.normal(size=positions.shape)
    at = energy.evaluate(start, box, forces=True, strain=strain)
    assert at.gradient is not None
    direction = rng.normal(size=positions.shape)
    if at.gradient.any():
        direction = direction / np.linalg.norm(direction) - at.gradient / np.linalg.norm(
            at.gradient
        )
    direction = direction / np.linalg.norm(direction, axis=-1).max()
    deformation = np.zeros((3, 3))
    if strain:
        # Lower triangular, so that a reduced box stays upright; as large as the displacements.
        size = np.abs(start - start.mean(axis=0)).max() if box is None else np.abs(box).max()
        deformation = np.tril(rng.normal(size=(3, 3))) / max(size, 0.1)

    def value(t: float) -> float:
        change = np.eye(3) + t * step * deformation
        moved = (start + t * step * direction) @ change
        cell = None if box is None else box @ change
        return energy.evaluate(moved, cell, forces=False, strain=False).energy

    near = {t: value(t) for t in (-2.0, -1.0, 1.0, 2.0)}
    rough = (near[1.0] - near[-1.0]) / (2 * step)
    change = (4 * rough - (near[2.0] - near[-2.0]) / (4 * step)) / 3
    predicted = float((at.gradient * direction).sum())
    scale = float(np.linalg.norm(at.gradient) * np.linalg.norm(direction))
    if at.strain_gradient is not None:
        predicted += float((at.strain_gradient * deformation).sum())
        scale += float(np.linalg.norm(at.strain_gradient) * np.linalg.norm(deformation))
    rounding = torch.finfo(dtype).eps * max(map(abs, near.values())) / step
    allowed = rtol * max(scale, abs(change)) + 3 * abs(change - rough) + 30 * rounding
    return change, predicted, allowed
