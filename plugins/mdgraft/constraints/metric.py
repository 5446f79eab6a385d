"""The metric tensor of constraints, and what it does to ensembles.

With constrained distances ``c_a = |r_a|``, ``Z = grad c . M^-1 . grad c^T``, and positions with
rigid constraints follow ``delta(c - d) det(Z)^(1/2) exp(-beta U)``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._types import BoxLike, PositionsLike
from mdgraft._units import BOLTZMANN
from mdgraft.constraints._clusters import Block
from mdgraft.constraints.constraint_set import ConstraintSet
from mdgraft.potentials.term import AbstractTerm


def log_metric_determinant(
    constraints: ConstraintSet,
    positions: PositionsLike,
    *,
    box: BoxLike = None,
    masses: Tensor | None = None,
) -> Tensor:
    """``ln det Z`` (Z in 1/Da) of each frame, differentiable to every order.

    Parameters
    ----------
    constraints
        The constraints.
    positions
        ``(..., N, 3)`` [nm].
    box
        ``(..., 3, 3)`` [nm], if the constraints are periodic.
    masses
        ``(N,)`` [Da], in place of the set's own.

    Returns
    -------
    Tensor
        ``(...,)``.

    Raises
    ------
    ConstraintError
        If constraints depend on each other.
    InvalidInputError
        For a wrong shape or NaN.
    """
    (frames,), cells, leading = constraints.frames(box, positions=positions)
    total = frames.new_zeros(frames.shape[0])
    for block in _blocks(constraints, frames, cells, masses):
        total = total + torch.linalg.slogdet(block.metric).logabsdet.sum(dim=-1)
    return total.reshape(leading)


def fixman_potential(
    constraints: ConstraintSet,
    positions: PositionsLike,
    temperature: float | Tensor,
    *,
    box: BoxLike = None,
    masses: Tensor | None = None,
) -> Tensor:
    """Fixman's potential ``kT/2 ln det Z`` [kJ/mol] of each frame.

    Added to the energy, it cancels the factor ``det(Z)^(1/2)``, so that constrained dynamics
    samples the distribution of infinitely stiff springs. (Fixman, PNAS 71, 3050 (1974).) Its zero
    is that of ``det Z = 1`` in powers of 1/Da. Arguments and errors as in
    `log_metric_determinant`; ``temperature`` is in K.
    """
    log_det = log_metric_determinant(constraints, positions, box=box, masses=masses)
    return 0.5 * BOLTZMANN * temperature * log_det


def length_response(
    constraints: ConstraintSet, frames: Tensor, gradients: Tensor, cells: Tensor | None = None
) -> Tensor:
    """Derivatives along the displacements ``w_b = M^-1 grad(c)^T Z^-1 e_b`` of each constraint.

    ``w_b`` changes distance b at unit rate and no other one.

    Parameters
    ----------
    constraints
        The constraints.
    frames
        ``(F, N, 3)`` [nm].
    gradients
        ``(F, S, N, 3)``, derivatives of S quantities by positions.
    cells
        ``(F, 3, 3)`` [nm], if the constraints are periodic.

    Returns
    -------
    Tensor
        ``(F, S, C)``.
    """
    n_frames, n_values = gradients.shape[:2]
    units, _ = constraints.unit_vectors(frames, cells)
    inverse = constraints.inverse_masses(None)
    velocities = (gradients * inverse.unsqueeze(-1)).flatten(0, 1)
    relative = constraints._vectors(velocities, None)
    relative = relative.reshape(n_frames, n_values, *relative.shape[1:])
    rates = (relative * units.unsqueeze(1)).sum(dim=-1)
    parts = []
    for block in _blocks(constraints, frames, cells, None):
        own = rates[..., block.rows].reshape(n_frames, n_values, *block.metric.shape[1:3])
        # (F, S, K, m) -> (F, K, m, S) and back.
        solved = torch.linalg.solve(block.metric, own.permute(0, 2, 3, 1))
        parts.append(solved.permute(0, 3, 1, 2).flatten(2))
    joined = torch.cat(parts, dim=-1) if parts else rates
    return joined[..., constraints._places]


def metric_response(
    constraints: ConstraintSet, frames: Tensor, cells: Tensor | None = None
) -> Tensor:
    """``1/2 w_b . grad ln det Z + div w_b`` of each constraint, ``(F, C)`` [1/nm].

    What the measure adds to the derivative of an average in a length, with w_b as in
    `length_response`. The second derivatives of distances combine to

        sum_c (Z^-1)_cb / |r_c| [3 C_cc - sum_ae (Z^-1)_ae C_ca C_ce u_a . u_e]

    with unit vectors u and the coupling C of inverse masses, ``Z_ae = C_ae u_a . u_e``. It is the
    same in all frames for rigid molecules, and only then.
    """
    _, distances = constraints.unit_vectors(frames, cells)
    parts = []
    for block in _blocks(constraints, frames, cells, None):
        c, z = block.coupling, block.metric
        overlap = torch.linalg.inv(z) * (block.units @ block.units.mT)
        bent = ((c @ overlap) * c).sum(dim=-1)
        own = distances[:, block.rows].reshape(len(distances), *z.shape[1:3])
        target = (3.0 * c.diagonal(dim1=-2, dim2=-1) - bent) / own
        parts.append(torch.linalg.solve(z, target.unsqueeze(-1)).squeeze(-1).flatten(1))
    joined = torch.cat(parts, dim=-1) if parts else distances
    return joined[..., constraints._places]


class Fixman(AbstractTerm):
    """Fixman's potential as a term of a potential; see `fixman_potential`.

    Its only parameter, ``mass`` [Da], is constant until ``requires_grad_()`` is called on it.

    Parameters
    ----------
    constraints
        The constraints; their lengths do not matter.
    temperature
        [K]

    Raises
    ------
    InvalidInputError
        For a temperature that is not positive.
    """

    general_cell = True

    def __init__(self, constraints: ConstraintSet, temperature: float) -> None:
        super().__init__(periodic=any(constraints.pbc))
        if not 0.0 < temperature < float("inf"):
            raise InvalidInputError(f"temperature: got {temperature!r}, wanted a positive one in K")
        self.temperature = float(temperature)
        mass = constraints.masses.detach().clone()
        self.add_parameter("mass", mass, "dalton")
        self.requires_grad_(False)
        # Not a submodule: its lengths and masses are no parameters of this term.
        self._structure = [copy.deepcopy(constraints)]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved: Any = self._structure[0]
        moved._apply(fn, recurse)
        base: Any = super()
        return base._apply(fn, recurse)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energies ``(F,)`` [kJ/mol]."""
        (constraints,) = self._structure
        return fixman_potential(
            constraints, positions, self.temperature, box=box, masses=values["mass"]
        )


def _blocks(
    constraints: ConstraintSet, frames: Tensor, cells: Tensor | None, masses: Tensor | None
) -> Iterator[Block]:
    """Dense blocks of all batches, with rows that count through all of them."""
    units, _ = constraints.unit_vectors(frames, cells)
    inverse = constraints.inverse_masses(masses)
    start = 0
    for batch, rows in constraints.rows():
        coupling = batch.coupling(inverse[batch.first], inverse[batch.second])
        own = rows(units)
        batch.check_regular(batch.matrix(coupling * batch.products(own, own)))
        for block in batch.blocks(coupling, own):
            part = slice(start + block.rows.start, start + block.rows.stop)
            yield dataclasses.replace(block, rows=part)
        start += batch.first.numel()
