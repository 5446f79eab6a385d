"""Lennard-Jones and Coulomb interactions of all pairs within the cutoff."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdgraft._units import COULOMB
from mdgraft.kernels.derivatives import differentiable_energy
from mdgraft.kernels.kernel import Kernel
from mdgraft.kernels.pairs import all_pairs, exclusion_keys, neighbor_pairs
from mdgraft.kernels.routes import Route, pair_kernel, route
from mdgraft.kernels.switch import compiled_kernels
from mdgraft.potentials import pair_forms
from mdgraft.potentials.item_term import plain_array

if TYPE_CHECKING:
    from mdgraft.potentials.nonbonded import NonbondedSettings

_ROOT_COULOMB = math.sqrt(COULOMB)


class DirectSpace:
    """The sum over pairs of a nonbonded term, compiled or by plain torch operations.

    Parameters
    ----------
    settings
        Of the term.
    exceptions
        ``(exceptions, 2)`` pairs that are left out.
    switched
        Whether the first shared quantity is a switching distance.
    """

    def __init__(
        self, settings: NonbondedSettings, exceptions: Tensor, n_particles: int, *, switched: bool
    ) -> None:
        self.settings = settings
        self.switched = switched and settings.method.value != "LJPME"
        self._n_particles = n_particles
        # An array, since a tensor made inside a torch.func transform must not outlive it.
        self._exceptions = plain_array(exceptions)
        self._kernels: dict[Route, Kernel] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code belongs to this process.
        return self.__dict__ | {"_kernels": {}}

    def energy(
        self,
        positions: Tensor,
        box: Tensor | None,
        charge: Tensor,
        sigma: Tensor,
        epsilon: Tensor,
        shared: Sequence[Tensor],
    ) -> Tensor:
        """Energies ``(frames,)`` [kJ/mol].

        Parameters
        ----------
        positions, box
            ``(frames, N, 3)``, ``(frames, 3, 3)`` [nm].
        charge, sigma, epsilon
            ``(N,)`` [e], [nm], [kJ/mol].
        shared
            Switching distance [nm] and dielectric constant of the reaction field, those there are.
        """
        root = pair_forms.root_epsilon(epsilon)
        quantities = [_ROOT_COULOMB * charge, 0.5 * sigma, 2 * root]
        if self.settings.method.value == "LJPME":
            quantities.append(2 * root * sigma**3)
        if not compiled_kernels(positions):
            cell = positions.new_zeros(positions.shape[0], 0, 3) if box is None else box
            return self.plain(positions, cell, *quantities, *shared)
        kernel = self._kernel(positions)
        return differentiable_energy(kernel, positions, box, [*quantities, *shared])

    def _kernel(self, positions: Tensor) -> Kernel:
        key = route(positions)
        kernel = self._kernels.get(key)
        if kernel is None:
            from mdgraft.potentials.nonbonded_formula import nonbonded_kernel

            kernel = nonbonded_kernel(
                self.settings,
                self._exceptions,
                switched=self.switched,
                dtype=positions.dtype,
                make=pair_kernel(positions),
                n_particles=self._n_particles,
                reference=self.plain,
            )
            self._kernels[key] = kernel
        return kernel

    def plain(self, positions: Tensor, box: Tensor, *quantities: Tensor) -> Tensor:
        """The same by plain torch operations.

        Takes the kernel's inputs: charges times the square root of 1/(4 pi eps0), sigma/2,
        2 sqrt(epsilon), with a dispersion mesh c6, then what all pairs share. ``box`` is
        ``(frames, 0, 3)`` in an open system.
        """
        settings = self.settings
        charge, radius, depth, *rest = quantities
        cell = box if box.shape[1] else None
        pairs_of_exceptions = torch.as_tensor(self._exceptions, device=positions.device)
        excluded = exclusion_keys(pairs_of_exceptions, self._n_particles)
        if math.isinf(settings.cutoff):
            pairs = all_pairs(positions.shape[1], excluded)
        else:
            pairs = neighbor_pairs(positions, cell, cutoff=settings.cutoff, excluded=excluded)
        i, j = pairs.first, pairs.second
        vectors = pairs.displacements(positions, cell)
        r2 = (vectors * vectors).sum(dim=-1)
        qq = charge[i] * charge[j] / COULOMB
        s, e = radius[i] + radius[j], 0.25 * depth[i] * depth[j]
        lj = pair_forms.lennard_jones(r2, s, e)
        if math.isinf(settings.cutoff):
            return pairs.sum(lj + pair_forms.coulomb(r2, qq), positions.shape[0])
        if settings.method.value == "LJPME":
            c6 = rest.pop(0)
            lj = lj + pair_forms.ljpme_direct(
                r2, c6[i] * c6[j], s, e, settings.dispersion_alpha, settings.cutoff
            )
        elif self.switched:
            lj = lj * pair_forms.switch(torch.sqrt(r2), rest.pop(0), settings.cutoff)
        if settings.method.ewald:
            electrostatic = pair_forms.ewald_direct(r2, qq, settings.alpha)
        else:
            electrostatic = pair_forms.reaction_field(r2, qq, settings.cutoff, rest.pop(0))
        within = r2 < settings.cutoff**2
        return pairs.sum(torch.where(within, lj + electrostatic, 0.0), positions.shape[0])
