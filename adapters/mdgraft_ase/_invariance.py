"""Whether a potential may be evaluated in a rotated frame."""

from __future__ import annotations

import numpy as np
import torch
from mdgraft import InvalidInputError, Potential

# [nm] away from symmetric places, where a torque may vanish by accident.
_DISPLACEMENT = 0.003
_RTOL = 1e-6


def check_rotation(potential: Potential, positions: np.ndarray, box: np.ndarray) -> None:
    """Raise if the energy depends on the direction of the axes.

    The derivative of the energy by a rotation of atoms and box is the antisymmetric part of the
    strain gradient. Terms that OpenMM evaluates know six box derivatives only and are trusted
    if they are periodic.

    Parameters
    ----------
    potential
        Its terms are tried one by one.
    positions
        ``(N, 3)`` [nm].
    box
        ``(3, 3)`` [nm] in reduced form.

    Raises
    ------
    InvalidInputError
        If a term has a direction of its own, such as an external field.
    """
    noise = np.random.default_rng(0).normal(0, _DISPLACEMENT, positions.shape)
    dtype, device = potential.dtype, potential.device
    # In single precision a small torque is hidden by rounding.
    rtol = _RTOL if potential.dtype == torch.float64 else 1e-2
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.tensor(positions + noise, dtype=dtype, device=device, requires_grad=True)
        h = torch.tensor(box, dtype=dtype, device=device, requires_grad=True)
        energies = potential.energy_by_term(x, h, values=potential.values({}))
        directed = []
        for name, energy in energies.items():
            by_x, by_h = torch.autograd.grad(
                energy, (x, h), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            moves = bool(by_x.any())
            if not moves or (potential.term(name).periodic and potential.routes[name] == "host"):
                continue
            strain = x.T @ by_x + h.T @ by_h
            scale = (x - x.mean(dim=0)).abs().T @ by_x.abs() + h.abs().T @ by_h.abs()
            if bool((strain - strain.T).abs().max() > rtol * scale.max()):
                directed.append(name)
    if directed:
        raise InvalidInputError(
            f"atoms.cell: it must be rotated to the form that OpenMM has, but the energy of "
            f"{', '.join(directed)} depends on directions in space; give Atoms a cell whose first "
            "vector lies along x and whose second lies in the xy plane "
            "(atoms.cell.standard_form() finds one), and place them accordingly"
        )
