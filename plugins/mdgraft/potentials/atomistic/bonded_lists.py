"""Bonded and pair energies listed one by one, over the nearest images in any cell."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import (
    ANGLE_FORCE_CONSTANT,
    BOND_FORCE_CONSTANT,
    DIMENSIONLESS,
    ENERGY,
    NANOMETER,
    RADIAN,
)
from mdgraft.kernels.periodic import reciprocal
from mdgraft.potentials.geometry import polar_angle, rescaled, safe_norm, vanishes
from mdgraft.potentials.term import AbstractTerm

#: Particles of one item, and parameters with units, by kind of interaction.
KINDS: dict[str, tuple[int, dict[str, str]]] = {
    "morse": (2, {"D": ENERGY, "alpha": "/nanometer", "r0": NANOMETER}),
    "bond": (2, {"k": BOND_FORCE_CONSTANT, "b0": NANOMETER}),
    "angle": (3, {"k": ANGLE_FORCE_CONSTANT, "a0": RADIAN}),
    "cosine_angle": (3, {"k": ENERGY, "a0": RADIAN}),
    "dihedral": (4, {"k": ENERGY}),
    "harmonic_dihedral": (4, {"k": ANGLE_FORCE_CONSTANT, "d0": RADIAN}),
    "periodic_dihedral": (4, {"k": ENERGY, "d0": RADIAN, "n": DIMENSIONLESS}),
    "vdw": (
        2,
        {"Aij": "kilojoule*nanometer**12/mole", "Bij": "kilojoule*nanometer**6/mole"},
    ),
    "coulomb": (2, {"chargeij": "kilojoule*nanometer/mole"}),
}


class BondedLists(AbstractTerm):
    """A force field whose interactions are listed one by one.

    =================  ======================================================
    Kind               Energy of an item
    =================  ======================================================
    morse              ``D (1 - exp(-alpha (r - r0)))^2``
    bond               ``k/2 (r - b0)^2``
    angle              ``k/2 (a - a0)^2``, differences modulo pi
    cosine_angle       ``k/2 (cos a - cos a0)^2``
    dihedral           ``k/2 (1 - cos 2d)``
    harmonic_dihedral  ``k/2 (d - d0)^2``, differences modulo 2 pi
    periodic_dihedral  ``k (1 + cos(n d - d0))``
    vdw                ``Aij/r^12 - Bij/r^6``
    coulomb            ``chargeij/r``
    =================  ======================================================

    Fractional coordinates of every vector are rounded to the nearest cell in all three directions.
    The second particle of an angle is its vertex. Parameters are called ``bond_k`` and so on.

    Parameters
    ----------
    particles
        ``(items, 2, 3 or 4)`` indices by kind.
    parameters
        ``(items,)`` each, by kind and name, see `KINDS`.
    periodic
        Whether a box is expected.
    cell
        ``(3, 3)`` [nm], what images are taken in when no box is expected.
    """

    general_cell = True
    cell: Tensor

    def __init__(
        self,
        *,
        particles: Mapping[str, Tensor],
        parameters: Mapping[str, Mapping[str, Tensor]],
        periodic: bool,
        cell: Tensor,
    ) -> None:
        super().__init__(periodic=periodic)
        self.register_buffer("cell", cell)
        self.kinds = tuple(particles)
        for kind, indices in particles.items():
            self.register_buffer(f"{kind}_particles", indices)
            for name, unit in KINDS[kind][1].items():
                self.add_parameter(f"{kind}_{name}", parameters[kind][name], unit)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        h = self.cell[None] if box is None else box
        total = positions.new_zeros(positions.shape[0])
        for kind in self.kinds:
            own = [values[f"{kind}_{name}"] for name in KINDS[kind][1]]
            indices = self.get_buffer(f"{kind}_particles").unbind(dim=-1)
            if len(indices) == 2:
                i, j = indices
                r = safe_norm(_vectors(positions, h, i, j))
                energies = _of_distance(kind, r, own)
            elif len(indices) == 3:
                i, j, k = indices
                arms = _vectors(positions, h, i, j), _vectors(positions, h, k, j)
                energies = _of_angle(kind, *arms, own)
            else:
                i, j, k, m = indices
                energies = _of_dihedral(
                    kind,
                    _dihedral(
                        _vectors(positions, h, i, j),
                        _vectors(positions, h, k, j),
                        _vectors(positions, h, k, m),
                    ),
                    own,
                )
            total = total + energies.sum(dim=-1)
        return total


def _vectors(positions: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Nearest images of vectors from ``j`` to ``i``, ``(frames, items, 3)``."""
    vectors = positions[:, i] - positions[:, j]
    images = torch.floor(vectors.detach() @ reciprocal(h.detach()) + 0.5)
    return vectors - images @ h


def _of_distance(kind: str, r: Tensor, own: list[Tensor]) -> Tensor:
    if kind == "morse":
        depth, alpha, r0 = own
        return depth * (1.0 - torch.exp(-alpha * (r - r0))) ** 2
    if kind == "bond":
        k, b0 = own
        return 0.5 * k * (r - b0) ** 2
    if kind == "vdw":
        a, b = own
        return a / r**12 - b / r**6
    return own[0] / r


def _of_angle(kind: str, first: Tensor, second: Tensor, own: list[Tensor]) -> Tensor:
    k, a0 = own
    first, second = rescaled(first), rescaled(second)
    cross, dot = torch.linalg.cross(first, second), (first * second).sum(dim=-1)
    if kind == "cosine_angle":
        size = safe_norm(first) * safe_norm(second)
        cosine = torch.where(size == 0, 0.0, dot / torch.where(size == 0, 1.0, size))
        return 0.5 * k * (cosine - torch.cos(a0)) ** 2
    flat = vanishes(cross).unsqueeze(-1)
    a = polar_angle(safe_norm(torch.where(flat, 0.0, cross)), dot, 0.5 * math.pi)
    # An angle has a cusp where it is straight. Its square is smooth if a0 is straight too: there it
    # is that of the tangent, whose second derivative is the bending stiffness.
    straight = flat.squeeze(-1) & (dot != 0)
    tangent = cross / torch.where(straight, dot, 1.0).unsqueeze(-1)
    limit = math.pi * (dot < 0).to(dot.dtype)
    smooth = (tangent * tangent).sum(dim=-1) + _modulo(limit - a0, math.pi) ** 2
    return 0.5 * k * torch.where(straight, smooth, _modulo(a - a0, math.pi) ** 2)


def _of_dihedral(kind: str, d: Tensor, own: list[Tensor]) -> Tensor:
    if kind == "dihedral":
        return 0.5 * own[0] * (1.0 - torch.cos(2.0 * d))
    if kind == "harmonic_dihedral":
        k, d0 = own
        return 0.5 * k * _modulo(d - d0, 2.0 * math.pi) ** 2
    k, d0, n = own
    return k * (1.0 + torch.cos(n * d - d0))


def _modulo(x: Tensor, period: float) -> Tensor:
    return x - torch.round(x.detach() / period) * period


def _dihedral(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Between the planes of a and b and of b and c, zero for cis."""
    a, b, c = rescaled(a), rescaled(b), rescaled(c)
    ab, bc = torch.linalg.cross(a, b), torch.linalg.cross(b, c)
    undefined = vanishes(ab) | vanishes(bc)
    y = torch.where(undefined, 0.0, safe_norm(b) * (a * bc).sum(dim=-1))
    x = torch.where(undefined, 0.0, (ab * bc).sum(dim=-1))
    return polar_angle(y, x, 0.5 * math.pi)
