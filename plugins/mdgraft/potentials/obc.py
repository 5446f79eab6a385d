"""Implicit solvent: generalized Born with OBC radii and a surface-area term."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mdgraft._units import CHARGE, COULOMB, DIMENSIONLESS, NANOMETER, SURFACE_ENERGY
from mdgraft.kernels.derivatives import differentiable_energy
from mdgraft.kernels.kernel import Kernel
from mdgraft.kernels.pairs import Pairs, all_pairs, neighbor_pairs
from mdgraft.kernels.routes import Route, pair_kernel, route
from mdgraft.kernels.sums import particle_sums
from mdgraft.kernels.switch import compiled_kernels
from mdgraft.potentials.geometry import safe_norm
from mdgraft.potentials.item_term import cell_of
from mdgraft.potentials.term import AbstractTerm

if TYPE_CHECKING:
    from mdgraft.kernels.fused.pair_formulas import PairFormula

# Constants of model II of the paper, and of OpenMM [nm].
_ALPHA, _BETA, _GAMMA = 1.0, 0.8, 4.85
_OFFSET, _PROBE = 0.009, 0.14


class GeneralizedBornOBC(AbstractTerm):
    """Generalized Born solvation with effective radii of type OBC II, and a surface-area term.

    Parameters
    ----------
    charge, radius, scaling_factor
        ``(N,)`` [e], [nm], dimensionless.
    solute_dielectric, solvent_dielectric
        ``()``; zero for either leaves only the surface.
    surface_area_energy
        ``()`` [kJ/mol/nm^2].
    cutoff
        [nm]; infinite for all pairs. With a cutoff the pair energy is shifted to zero there but for
        the effective radii.
    periodic
        Whether distances are those of nearest periodic images.

    References
    ----------
    A. Onufriev, D. Bashford and D. A. Case, Proteins 55, 383 (2004), eqs. 6 to 8; surface term:
    M. Schaefer, C. Bartels and M. Karplus, J. Mol. Biol. 284, 835 (1998).
    """

    replays = True

    excluded: Tensor

    def __init__(
        self,
        charge: Tensor,
        radius: Tensor,
        scaling_factor: Tensor,
        *,
        solute_dielectric: Tensor,
        solvent_dielectric: Tensor,
        surface_area_energy: Tensor,
        cutoff: float = math.inf,
        periodic: bool = False,
    ) -> None:
        super().__init__(periodic=periodic)
        self.cutoff, self._n = cutoff, len(charge)
        self._kernels: dict[Route, tuple[Kernel, Kernel]] = {}
        nothing = torch.empty(0, dtype=torch.long)
        self.register_buffer("excluded", nothing, persistent=False)
        self.add_parameter("charge", charge, CHARGE)
        self.add_parameter("radius", radius, NANOMETER)
        self.add_parameter("scaling_factor", scaling_factor, DIMENSIONLESS)
        self.add_parameter("solute_dielectric", solute_dielectric, DIMENSIONLESS)
        self.add_parameter("solvent_dielectric", solvent_dielectric, DIMENSIONLESS)
        self.add_parameter("surface_area_energy", surface_area_energy, SURFACE_ENERGY)

    @property
    def framewise(self) -> bool:
        """Whether `torch.vmap` over frames costs about what a batch of frames costs."""
        charge = self._parameters["charge"]
        return charge is not None and compiled_kernels(charge)

    @property
    def collects(self) -> bool:
        """Whether its kernels tell all about a frame: effective radii depend on parameters."""
        return False

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        charge, radius = values["charge"], values["radius"]
        offset = radius - _OFFSET
        own = (offset, offset * values["scaling_factor"])
        compiled = compiled_kernels(positions)
        if compiled:
            descreening, solvation = self._compiled(positions)
            descreened = particle_sums(descreening, positions, box, own)
        else:
            pairs, r = self._pairs(positions, box)
            descreened = self._descreened(pairs, r, *own, n_frames=positions.shape[0])
        psi = 0.5 * offset * descreened
        smooth = torch.tanh(psi * (_ALPHA - psi * (_BETA - _GAMMA * psi)))
        born = 1 / (1 / offset - smooth / radius)

        if compiled:
            energy = differentiable_energy(solvation, positions, box, [charge, born])
        else:
            energy = self._screened(pairs, r, charge, born)
        tau = _difference(values["solute_dielectric"], values["solvent_dielectric"])
        energy = -COULOMB * tau * (energy + 0.5 * (charge * charge / born).sum(dim=-1))

        area = 4 * math.pi * (radius + _PROBE) ** 2 * (radius / born) ** 6
        exposed = torch.where(born > 0, area, 0.0).sum(dim=-1)
        return energy + values["surface_area_energy"] * exposed

    # Plain torch ------------------------------------------------------------------------------

    def _pairs(self, positions: Tensor, box: Tensor | None) -> tuple[Pairs, Tensor]:
        """Pairs and their distances."""
        if math.isinf(self.cutoff):
            pairs = all_pairs(positions.shape[1], self.excluded)
        else:
            pairs = neighbor_pairs(positions, box, cutoff=self.cutoff, excluded=self.excluded)
        return pairs, safe_norm(pairs.displacements(positions, box))

    def _descreened(
        self, pairs: Pairs, r: Tensor, offset: Tensor, scaled: Tensor, *, n_frames: int
    ) -> Tensor:
        """What neighbours take from each particle's Coulomb field, ``(frames, N)`` [1/nm]."""
        within = r <= self.cutoff
        total = torch.zeros(n_frames, len(offset), dtype=r.dtype, device=r.device)
        for at, by in ((pairs.first, pairs.second), (pairs.second, pairs.first)):
            integral = torch.where(within, _integral(r, offset[at], scaled[by]), 0.0)
            total = pairs.add_at(total, at, integral)
        return total

    def _screened(self, pairs: Pairs, r: Tensor, charge: Tensor, born: Tensor) -> Tensor:
        """Sum of ``q_i q_j (1/f - 1/cutoff)`` with Still's f, ``(frames,)`` [e^2/nm]."""
        i, j = pairs.first, pairs.second
        product = pairs.at(born, i) * pairs.at(born, j)
        distance = torch.sqrt(r * r + product * torch.exp(-r * r / (4 * product)))
        screened = charge[i] * charge[j] * (1 / distance - self._shift)
        return pairs.sum(torch.where(r <= self.cutoff, screened, 0.0), born.shape[0])

    @property
    def _shift(self) -> float:
        return 0.0 if math.isinf(self.cutoff) else 1 / self.cutoff

    # Compiled ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code belongs to this process.
        return self.__dict__ | {"_kernels": {}}

    def _compiled(self, positions: Tensor) -> tuple[Kernel, Kernel]:
        key = route(positions)
        if key not in self._kernels:
            from mdgraft.kernels.fused.clusters import Exclusions
            from mdgraft.potentials.obc_formulas import DESCREENING, SOLVATION

            make = pair_kernel(positions)

            def kernel(formula: PairFormula, reference: Callable[..., Tensor]) -> Kernel:
                return make(
                    formula,
                    # The cutoff itself is within.
                    cutoff=math.nextafter(self.cutoff, math.inf),
                    exclusions=Exclusions.of_pairs(np.empty((0, 2), dtype=np.int64), self._n),
                    constants={"shift": self._shift},
                    reference=reference,
                )

            self._kernels[key] = (
                kernel(DESCREENING, self._plain_descreening),
                kernel(SOLVATION, self._plain_solvation),
            )
        return self._kernels[key]

    def _plain_descreening(
        self, positions: Tensor, box: Tensor, weight: Tensor, offset: Tensor, scaled: Tensor
    ) -> Tensor:
        pairs, r = self._pairs(positions, cell_of(box))
        total = self._descreened(pairs, r, offset, scaled, n_frames=positions.shape[0])
        return (weight * total).sum(dim=-1)

    def _plain_solvation(
        self, positions: Tensor, box: Tensor, charge: Tensor, born: Tensor
    ) -> Tensor:
        pairs, r = self._pairs(positions, cell_of(box))
        return self._screened(pairs, r, charge, born)


def _difference(solute: Tensor, solvent: Tensor) -> Tensor:
    """``1/solute - 1/solvent``; zero if either is zero, which switches charges off in OpenMM."""
    off = (solute == 0) | (solvent == 0)
    return torch.where(
        off, 0.0, 1 / torch.where(off, 1.0, solute) - 1 / torch.where(off, 1.0, solvent)
    )


def _integral(r: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """What a sphere of radius ``other`` at distance r takes from the Coulomb field of ``own``.

    G. D. Hawkins, C. J. Cramer and D. G. Truhlar, J. Phys. Chem. 100, 19824 (1996), eq. 9.
    """
    inside = own >= r + other
    # A sphere within the own one takes nothing: keep its logarithm out of the graph.
    upper = torch.where(inside, 1.0, r + other)
    lower = torch.where(inside, 1.0, torch.maximum(own.expand_as(r), (r - other).abs()))
    low, high = 1 / lower, 1 / upper
    inverse = 1 / torch.where(r == 0, 1.0, r)
    term = low - high + 0.25 * r * (high * high - low * low)
    term = term + 0.5 * inverse * torch.log(lower / upper)
    term = term + 0.25 * other * other * inverse * (low * low - high * high)
    term = term + torch.where(own < other - r, 2 * (1 / own - low), 0.0)
    return torch.where(inside, 0.0, term)
