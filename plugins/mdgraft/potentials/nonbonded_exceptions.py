"""Exceptions of a nonbonded term, and what they take out of the reciprocal-space sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdgraft._units import COULOMB
from mdgraft.kernels.special import erf_over_root
from mdgraft.potentials import pair_forms
from mdgraft.potentials.geometry import displacement
from mdgraft.potentials.item_term import ItemSum, cell_of

if TYPE_CHECKING:
    from mdgraft.kernels.fused.tuples import TupleFormula
    from mdgraft.potentials.nonbonded import NonbondedSettings


class NonbondedExceptions:
    """Sums over the exceptions of a nonbonded term.

    Parameters
    ----------
    settings
        Of the term.
    exceptions
        ``(exceptions, 2)`` particle indices.
    """

    def __init__(self, settings: NonbondedSettings, exceptions: Tensor) -> None:
        self.settings, self.exceptions = settings, exceptions
        periodic = settings.exceptions_periodic
        self._interactions = ItemSum(
            exceptions, self.plain_interactions, _interaction_formula, periodic=periodic
        )
        self._excluded = ItemSum(
            exceptions,
            self.plain_excluded,
            self._excluded_formula,
            periodic=periodic,
            constants={"alpha": settings.alpha, "dispersion_alpha": settings.dispersion_alpha},
        )

    def interactions(
        self,
        positions: Tensor,
        box: Tensor | None,
        charge_product: Tensor,
        sigma: Tensor,
        epsilon: Tensor,
    ) -> Tensor:
        """Plain Coulomb and Lennard-Jones energies ``(frames,)`` with parameters of their own."""
        return self._interactions.energy(positions, box, charge_product, sigma, epsilon)

    def excluded(
        self, positions: Tensor, box: Tensor | None, charge: Tensor, c6: Tensor | None
    ) -> Tensor:
        """What the reciprocal sums hold of the exceptions, ``(frames,)``.

        ``charge`` and, with a dispersion mesh, ``c6`` are ``(N,)``.
        """
        own = [charge] if c6 is None else [charge, c6]
        return self._excluded.energy(positions, box, *own)

    # Plain torch ------------------------------------------------------------------------------

    def _squares(self, positions: Tensor, box: Tensor) -> Tensor:
        """Squared distances ``(frames, exceptions)``."""
        vectors = displacement(positions, cell_of(box), *self.exceptions.unbind(-1))
        return (vectors * vectors).sum(dim=-1)

    def plain_interactions(self, positions: Tensor, box: Tensor, *quantities: Tensor) -> Tensor:
        """The same as `interactions`; ``box`` is ``(frames, 0, 3)`` unless it matters."""
        qq, sigma, epsilon = quantities
        r2 = self._squares(positions, box)
        # An excluded pair adds nothing, whatever its distance: keep 0 * infinity out of the graph.
        excluded = (qq == 0) & (epsilon == 0)
        coincident = excluded & (r2 == 0)
        overflow = excluded & (r2 <= 1e-6 * sigma * sigma)
        coulomb = pair_forms.coulomb(torch.where(coincident, 1.0, r2), qq)
        lj = pair_forms.lennard_jones(torch.where(overflow, 1.0, r2), sigma, epsilon)
        energy = torch.where(coincident, 0.0, coulomb) + torch.where(overflow, 0.0, lj)
        return energy.sum(dim=-1)

    def plain_excluded(self, positions: Tensor, box: Tensor, *quantities: Tensor) -> Tensor:
        """The same as `excluded`; ``box`` is ``(frames, 0, 3)`` unless it matters."""
        alpha, beta = self.settings.alpha, self.settings.dispersion_alpha
        charge, *rest = quantities
        i, j = self.exceptions.unbind(-1)
        r2 = self._squares(positions, box)
        energy = COULOMB * charge[i] * charge[j] * (alpha * erf_over_root(alpha**2 * r2))
        for c6 in rest:
            energy = energy - pair_forms.ljpme_mesh_share(r2, c6[i] * c6[j], beta)
        return energy.sum(dim=-1)

    # Compiled ---------------------------------------------------------------------------------

    def _excluded_formula(self) -> TupleFormula:
        from mdgraft.potentials import exception_formulas

        if self.settings.dispersion_alpha > 0:
            return exception_formulas.EXCLUDED_WITH_DISPERSION
        return exception_formulas.EXCLUDED


def _interaction_formula() -> TupleFormula:
    from mdgraft.potentials.exception_formulas import INTERACTION

    return INTERACTION
