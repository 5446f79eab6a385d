"""The embedded atom method and its angular-dependent extension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft._units import ENERGY
from mdgraft.kernels.images import ImagePairs
from mdgraft.potentials.atomistic.base import AbstractAtomisticTerm, Periods, per_particle
from mdgraft.potentials.atomistic.splines import spline
from mdgraft.potentials.geometry import safe_norm

#: Functions by family: what they are called, and the unit of their coefficients.
FAMILIES = {
    "embedded_energy": ENERGY,
    "electron_density": "density",
    "phi": ENERGY,
    "d": "sqrt(kilojoule/mole)/nanometer",
    "q": "sqrt(kilojoule/mole)/nanometer**2",
}


class EmbeddedAtom(AbstractAtomisticTerm):
    """Embedding energies, pair energies and, for ADP, dipole and quadrupole distortions.

    With sums over the neighbours j of each atom i within the cutoff ::

        rho_i = sum_j rho(r_ij)
        mu_i  = sum_j d(r_ij) r_ij (vector)
        lam_i = sum_j q(r_ij) r_ij r_ij (matrix)
        E_i   = F(rho_i) + sum_j phi(r_ij)/2 + mu_i.mu_i/2 + lam_i:lam_i/2 - tr(lam_i)**2/6

    all of them functions of the elements. M. S. Daw, M. I. Baskes, Phys. Rev. Lett. 50, 1285
    (1983); M. W. Finnis, J. E. Sinclair, Philos. Mag. A 50, 45 (1984), where the density depends on
    both elements; Y. Mishin, M. J. Mehl, D. A. Papaconstantopoulos, Acta Mater. 53, 4029 (2005).

    Functions are splines, and their parameters the B-spline coefficients: each acts on a few
    intervals only. They are called ``phi_Al_Ni`` and so on.

    Parameters
    ----------
    elements
        ``(N,)`` place of each particle's element.
    functions
        By family, for each element (``embedded_energy``) or element of the atom and of its
        neighbour, the name of the function's parameter.
    knots
        Knots of each function by that name [nm], those of embedding energies in units of the
        density.
    coefficients
        B-spline coefficients of each function, in the unit that `FAMILIES` gives.
    degrees
        Degree of each spline.
    cutoff
        [nm]
    pbc
        Which box vectors are periods.
    """

    elements: Tensor

    def __init__(
        self,
        *,
        elements: Tensor,
        functions: Mapping[str, Mapping[tuple[int, ...], str]],
        knots: Mapping[str, Tensor],
        coefficients: Mapping[str, Tensor],
        degrees: Mapping[str, int],
        cutoff: float,
        pbc: Periods,
    ) -> None:
        super().__init__(pbc=pbc)
        self.register_buffer("elements", elements)
        self.functions = {family: dict(members) for family, members in functions.items()}
        self.degrees = dict(degrees)
        self.cutoff = cutoff
        for family, members in functions.items():
            for name in dict.fromkeys(members.values()):
                self.register_buffer(f"{name}_knots", knots[name])
                self.add_parameter(name, coefficients[name], FAMILIES[family])

    def particle_energies(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each particle ``(frames, N)`` [kJ/mol]."""
        pairs = self.pairs(positions, box, self.cutoff, half=False)
        vectors = pairs.displacements(positions, box)
        r = safe_norm(vectors)
        inside = r < self.cutoff
        r = torch.where(inside, r, self.cutoff)

        def gathered(family: str, factors: Tensor | None = None) -> Tensor:
            """A function of each pair, times factors ``(pairs, ...)``, summed over neighbours."""
            found = torch.where(inside, self._of_pairs(family, r, pairs, values), 0.0)
            if factors is not None:
                found = found.reshape(-1, *(1,) * (factors.ndim - 1)) * factors
            return per_particle(positions, pairs, pairs.first, found)

        density = gathered("electron_density")
        energies = self._embedding(density, values) + 0.5 * gathered("phi")
        if "d" in self.functions:
            dipole = gathered("d", vectors)
            energies = energies + 0.5 * dipole.square().sum(dim=-1)
        if "q" in self.functions:
            quadrupole = gathered("q", vectors.unsqueeze(-1) * vectors.unsqueeze(-2))
            trace = quadrupole.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
            energies = energies + 0.5 * quadrupole.square().sum(dim=(-2, -1)) - trace**2 / 6.0
        return energies

    def _of_pairs(
        self, family: str, r: Tensor, pairs: ImagePairs, values: Mapping[str, Tensor]
    ) -> Tensor:
        own, other = self.elements[pairs.first], self.elements[pairs.second]
        result = torch.zeros_like(r)
        for name, members in self._by_function(family).items():
            chosen = torch.zeros_like(own, dtype=torch.bool)
            for i, j in members:
                chosen = chosen | ((own == i) & (other == j))
            places = chosen.nonzero().squeeze(-1)
            result = result.index_add(0, places, self._spline(name, r[places], values))
        return result

    def _embedding(self, density: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        result = torch.zeros_like(density)
        for name, members in self._by_function("embedded_energy").items():
            chosen = torch.zeros_like(self.elements, dtype=torch.bool)
            for (i,) in members:
                chosen = chosen | (self.elements == i)
            places = chosen.nonzero().squeeze(-1)
            own = density[:, places]
            found = self._spline(name, own.reshape(-1), values).reshape(own.shape)
            result = result.index_add(1, places, found)
        return result

    def _spline(self, name: str, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return spline(x, self.get_buffer(f"{name}_knots"), values[name], self.degrees[name])

    def _by_function(self, family: str) -> dict[str, Sequence[tuple[int, ...]]]:
        found: dict[str, list[tuple[int, ...]]] = {}
        for member, name in self.functions[family].items():
            found.setdefault(name, []).append(member)
        return dict(found)
