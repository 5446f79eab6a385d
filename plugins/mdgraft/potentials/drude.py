"""Drude oscillators: springs between a charge and its parent, and Thole-screened dipole pairs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import CHARGE, COULOMB, DIMENSIONLESS
from mdgraft.potentials import geometry
from mdgraft.potentials.term import AbstractTerm

POLARIZABILITY = "nanometer**3"


class Drude(AbstractTerm):
    r"""Anisotropic springs of Drude particles and screened interactions between dipoles.

    With d the vector from the parent to the Drude particle, n12 the direction from the first axis
    particle to the parent and n34 that from the third to the second axis particle,
    E = k3/2 d^2 + k1/2 (d.n12)^2 + k2/2 (d.n34)^2, where k_i + k3 = q^2/(4 pi eps0 alpha a_i),
    k3 = q^2/(4 pi eps0 alpha a3), a1 = aniso12, a2 = aniso34, a3 = 3 - a1 - a2. An oscillator
    without an axis has a_i = 1 for it, whatever its parameter.

    A screened pair adds S(u) q q'/(4 pi eps0 r) for all four pairs of charges of two dipoles, with
    S = 1 - (1 + u/2) exp(-u) and u = thole r/(alpha alpha')^(1/6); parents carry -q. Only these
    distances are those of nearest periodic images; springs are never wrapped.

    Parameters
    ----------
    particles
        ``(oscillators, 5)``: Drude particle, parent, axis particle of the first direction, and the
        two particles of the second direction; -1 for none.
    charge
        ``(oscillators,)`` charge of the Drude particle [e].
    polarizability
        ``(oscillators,)`` [nm^3].
    aniso12, aniso34
        ``(oscillators,)`` anisotropy of the polarizability along the two directions.
    pairs
        ``(pairs, 2)`` indices of oscillators.
    thole
        ``(pairs,)`` screening factor.
    periodic
        Whether screened pairs act between nearest periodic images.

    References
    ----------
    E. Harder et al., J. Chem. Theory Comput. 2, 1587 (2006); B. T. Thole, Chem. Phys. 59, 341
    (1981).
    """

    particles: Tensor
    pairs: Tensor

    def __init__(
        self,
        particles: Tensor,
        charge: Tensor,
        polarizability: Tensor,
        aniso12: Tensor,
        aniso34: Tensor,
        *,
        pairs: Tensor,
        thole: Tensor,
        periodic: bool,
    ) -> None:
        super().__init__(periodic=periodic)
        self.register_buffer("particles", particles)
        self.register_buffer("pairs", pairs)
        self.add_parameter("charge", charge, CHARGE)
        self.add_parameter("polarizability", polarizability, POLARIZABILITY)
        self.add_parameter("aniso12", aniso12, DIMENSIONLESS)
        self.add_parameter("aniso34", aniso34, DIMENSIONLESS)
        self.add_parameter("thole", thole, DIMENSIONLESS)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        return self._springs(positions, values) + self._screened(positions, box, values)

    def _springs(self, positions: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        drude, parent, first, *second = self.particles.unbind(-1)
        has_first = first >= 0
        has_second = (second[0] >= 0) & (second[1] >= 0)
        a1 = torch.where(has_first, values["aniso12"], 1.0)
        a2 = torch.where(has_second, values["aniso34"], 1.0)
        stiffness = COULOMB * values["charge"] ** 2 / values["polarizability"]
        k3 = stiffness / (3 - a1 - a2)
        k1, k2 = stiffness / a1 - k3, stiffness / a2 - k3

        d = positions[:, drude] - positions[:, parent]
        energy = k3 * (d * d).sum(dim=-1)
        for k, present, start, end in (
            (k1, has_first, first, parent),
            (k2, has_second, second[1], second[0]),
        ):
            # An absent axis is any vector at all, since it does not count.
            axis = positions[:, end] - positions[:, start.clamp(min=0)]
            along = (d * geometry.direction(axis)).sum(dim=-1)
            energy = energy + torch.where(present, k * along * along, 0.0)
        return 0.5 * energy.sum(dim=-1)

    def _screened(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, Tensor]
    ) -> Tensor:
        one, two = self.pairs.unbind(-1)
        charge, alpha = values["charge"], values["polarizability"]
        scale = values["thole"] / (alpha[one] * alpha[two]) ** (1 / 6)
        qq = charge[one] * charge[two]
        energy = torch.zeros_like(scale * qq)
        for i in (0, 1):
            for j in (0, 1):
                r = geometry.distance(
                    positions, box, self.particles[one, i], self.particles[two, j]
                )
                energy = energy + (1 if i == j else -1) * qq * scale * _screening(r * scale)
        return COULOMB * energy.sum(dim=-1)


def _screening(u: Tensor) -> Tensor:
    """``[1 - (1 + u/2) exp(-u)]/u``, 1/2 at zero."""
    zero = u == 0
    far = torch.where(zero, 1.0, u)
    # expm1 keeps the digits that the subtraction would lose.
    return torch.where(zero, 0.5, -(torch.expm1(-far) / far + 0.5 * torch.exp(-far)))
