"""Pairs of particles as expressions see them: ``r``, and each quantity of particles 1 and 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mdgraft.kernels.pairs import Pairs, all_pairs, neighbor_pairs
from mdgraft.potentials.geometry import safe_norm
from mdgraft.potentials.nonbonded import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderedPairs:
    """Pairs with their distances; it matters which particle is called 1 and which 2.

    Attributes
    ----------
    pairs
        Particle 1 is ``first``.
    r
        Distances [nm], ``(frames, pairs)`` or ``(pairs,)`` for a list by frame. Beyond the cutoff
        it is a constant within it, so that expressions are finite there.
    within
        Whether a pair is closer than the cutoff, shaped like ``r``; None without a cutoff.
    n_frames
        Number of frames.
    """

    pairs: Pairs
    r: Tensor
    within: Tensor | None
    n_frames: int

    def variables(
        self, particle: Mapping[str, Tensor], wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """``r`` and the wanted ones of ``<name>1`` and ``<name>2``.

        ``particle`` holds quantities ``(N,)`` or ``(frames, N)`` by name.
        """
        found = {}
        for name, value in particle.items():
            for label, index in (("1", self.pairs.first), ("2", self.pairs.second)):
                if name + label in wanted:
                    found[name + label] = self._gather(value, index)
        return found | {"r": self.r}

    def _gather(self, value: Tensor, index: Tensor) -> Tensor:
        if value.dim() == 1:
            return value[index]
        if self.pairs.frame is None:
            return value[:, index]
        return value[self.pairs.frame, index]

    def swapped(self) -> OrderedPairs:
        """The same pairs with particles 1 and 2 exchanged."""
        pairs = dataclasses.replace(self.pairs, first=self.pairs.second, second=self.pairs.first)
        return dataclasses.replace(self, pairs=pairs)

    def masked(self, pair_values: Tensor) -> Tensor:
        """One value for each pair, zero beyond the cutoff."""
        pair_values = pair_values.expand(self.r.shape)
        return pair_values if self.within is None else torch.where(self.within, pair_values, 0.0)

    def sum(self, pair_values: Tensor) -> Tensor:
        """Add up over pairs: ``(frames,)``."""
        return self.pairs.sum(self.masked(pair_values), self.n_frames)

    def sum_at_first(self, pair_values: Tensor, n_particles: int) -> Tensor:
        """Add up over the pairs of each particle 1: ``(frames, N)``."""
        pair_values = self.masked(pair_values)
        if self.pairs.frame is None:
            total = pair_values.new_zeros(self.n_frames, n_particles)
            return total.index_add(1, self.pairs.first, pair_values)
        total = pair_values.new_zeros(self.n_frames * n_particles)
        place = self.pairs.frame * n_particles + self.pairs.first
        return total.index_add(0, place, pair_values).reshape(self.n_frames, n_particles)


def list_pairs(
    positions: Tensor, box: Tensor | None, excluded: Tensor, *, method: Method, cutoff: float
) -> Pairs:
    """Every pair that interacts, once, in the order of OpenMM's Reference platform.

    Particle 1 has the lower index without a cutoff and the higher one with a cutoff.
    """
    if method is Method.NO_CUTOFF:
        return all_pairs(positions.shape[1], excluded)
    cell = box if method.periodic else None
    pairs = neighbor_pairs(positions, cell, cutoff=cutoff, excluded=excluded)
    return Pairs(
        first=torch.maximum(pairs.first, pairs.second),
        second=torch.minimum(pairs.first, pairs.second),
        frame=pairs.frame,
    )


def measure(
    pairs: Pairs, positions: Tensor, box: Tensor | None, *, method: Method, cutoff: float
) -> OrderedPairs:
    """Distances of pairs."""
    r = safe_norm(pairs.displacements(positions, box if method.periodic else None))
    within = None
    if method is not Method.NO_CUTOFF:
        within = r < cutoff
        r = torch.where(within, r, 0.75 * cutoff)
    return OrderedPairs(pairs=pairs, r=r, within=within, n_frames=positions.shape[0])


def particle_and_pair_names(names: Collection[str]) -> frozenset[str]:
    """``<name>1`` and ``<name>2`` of each name."""
    return frozenset(name + label for name in names for label in "12")
