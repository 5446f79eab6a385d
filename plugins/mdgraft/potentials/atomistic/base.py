"""What terms over all periodic images have in common."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.kernels.images import ImagePairs, image_pairs
from mdgraft.kernels.observe import observe
from mdgraft.potentials.term import AbstractTerm

#: Which box vectors are periods.
Periods = tuple[bool, bool, bool]


class AbstractAtomisticTerm(AbstractTerm):
    """A term that is a sum over particles, in any cell, periodic in any directions.

    Parameters
    ----------
    pbc
        Which box vectors are periods. The term needs a box if any is.
    """

    general_cell = True

    def __init__(self, *, pbc: Periods) -> None:
        super().__init__(periodic=any(pbc))
        self.pbc = pbc

    @abc.abstractmethod
    def particle_energies(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each particle ``(frames, N)`` [kJ/mol]; arguments are those of `forward`."""

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        return self.particle_energies(positions, box, values, global_values).sum(dim=-1)

    def pairs(
        self, positions: Tensor, box: Tensor | None, cutoff: Tensor | float, *, half: bool
    ) -> ImagePairs:
        """Pairs within a cutoff, which may itself be a parameter; see `image_pairs`.

        Raises
        ------
        InvalidInputError
            If the cutoff is not positive.
        """
        reach = largest(cutoff) if isinstance(cutoff, Tensor) else cutoff
        if not 0 < reach < math.inf:
            raise InvalidInputError(
                f"cutoff: {type(self).__name__} has one of {reach:g} nm, wanted a positive number; "
                "look at the parameters that set it"
            )
        # Rounding of the cutoff must not lose pairs; each distance is compared with it later.
        return image_pairs(positions, box, cutoff=reach * (1 + 1e-6), pbc=self.pbc, half=half)


def largest(value: Tensor) -> float:
    """The largest entry of a tensor as a number, under transforms of ``torch.func`` as well."""
    found: list[float] = []

    def look(plain: Tensor) -> Tensor:
        found.append(float(plain.max()))
        return torch.empty(0)

    def nothing(result: Tensor, n_frames: int) -> Tensor:
        return result

    observe(look, nothing, value.reshape(1, -1))
    return max(found)


def per_particle(like: Tensor, pairs: ImagePairs, particles: Tensor, energies: Tensor) -> Tensor:
    """Add what pairs contribute ``(pairs,)`` up by particle, ``(frames, N)``.

    Parameters
    ----------
    like
        Positions ``(frames, N, 3)``.
    pairs
        The list.
    particles
        ``pairs.first`` or ``pairs.second``.
    energies
        ``(pairs, ...)``.
    """
    n_frames, n_particles = like.shape[:2]
    total = energies.new_zeros(n_frames * n_particles, *energies.shape[1:])
    total = total.index_add(0, pairs.frame * n_particles + particles, energies)
    return total.reshape(n_frames, n_particles, *energies.shape[1:])


def shared_equally(like: Tensor, pairs: ImagePairs, energies: Tensor) -> Tensor:
    """Half of each pair's energy for either particle, ``(frames, N)``."""
    half = 0.5 * energies
    return per_particle(like, pairs, pairs.first, half) + per_particle(
        like, pairs, pairs.second, half
    )
