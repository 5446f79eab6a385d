"""Lists of interacting pairs over a batch of frames."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import BoxTooSmallError, InvalidInputError
from mdgraft.kernels.observe import observe
from mdgraft.kernels.periodic import minimum_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of particles, either the same in every frame or listed frame by frame.

    Attributes
    ----------
    first, second
        ``(pairs,)`` particle indices.
    frame
        ``(pairs,)`` frame of each pair, or None when every frame has the same pairs.
    """

    first: Tensor
    second: Tensor
    frame: Tensor | None = None

    def displacements(self, positions: Tensor, box: Tensor | None) -> Tensor:
        """Vectors from ``first`` to ``second``.

        ``positions`` is ``(frames, N, 3)``; with a ``box`` ``(frames, 3, 3)`` the minimum image is
        taken. The result is ``(frames, pairs, 3)``, or ``(pairs, 3)`` for a list by frame.
        """
        if self.frame is None:
            vectors = positions[:, self.second] - positions[:, self.first]
            return vectors if box is None else minimum_image(vectors, box[:, None])
        vectors = positions[self.frame, self.second] - positions[self.frame, self.first]
        if box is None:
            return vectors
        cell = box[0] if box.shape[0] == 1 else box[self.frame]
        return minimum_image(vectors, cell)

    def at(self, quantity: Tensor, particles: Tensor) -> Tensor:
        """A quantity ``(frames, N, ...)`` of one particle of each pair, in the pairs' order."""
        if self.frame is None:
            return quantity[:, particles]
        return quantity[self.frame, particles]

    def add_at(self, total: Tensor, particles: Tensor, contributions: Tensor) -> Tensor:
        """Add what pairs contribute to one of their particles to ``total`` ``(frames, N, ...)``."""
        if self.frame is None:
            return total.index_add(1, particles, contributions)
        n = total.shape[1]
        flat = total.flatten(0, 1).index_add(0, self.frame * n + particles, contributions)
        return flat.reshape(total.shape)

    def sum(self, energies: Tensor, n_frames: int) -> Tensor:
        """Add pair energies up to ``(frames,)``."""
        if self.frame is None:
            return energies.sum(dim=-1)
        if n_frames == 1:
            return energies.sum(dim=-1, keepdim=True)
        return energies.new_zeros(n_frames).index_add(0, self.frame, energies)


# Arrays, since a tensor made inside a torch.func transform must not outlive it.
@functools.lru_cache(maxsize=8)
def _triangle(n_particles: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.triu_indices(n_particles, 1)
    return first, second


def _without(first: Tensor, second: Tensor, n_particles: int, excluded: Tensor) -> Tensor:
    """Mask of the pairs that are not among the sorted keys ``lower * n_particles + upper``."""
    if excluded.numel() == 0:
        return torch.ones_like(first, dtype=torch.bool)
    keys = torch.minimum(first, second) * n_particles + torch.maximum(first, second)
    place = torch.searchsorted(excluded, keys).clamp(max=excluded.numel() - 1)
    return excluded[place] != keys


def exclusion_keys(pairs: Tensor, n_particles: int) -> Tensor:
    """Sorted keys of excluded pairs ``(exclusions, 2)`` for the functions of this module."""
    lower, upper = pairs.min(dim=-1).values, pairs.max(dim=-1).values
    result: Tensor = torch.unique(lower * n_particles + upper)
    return result


def all_pairs(n_particles: int, excluded: Tensor) -> Pairs:
    """Every pair that is not excluded, the same in all frames."""
    first, second = (
        torch.as_tensor(index, device=excluded.device) for index in _triangle(n_particles)
    )
    keep = _without(first, second, n_particles, excluded)
    return Pairs(first=first[keep], second=second[keep])


def neighbor_pairs(
    positions: Tensor, box: Tensor | None, *, cutoff: float, excluded: Tensor
) -> Pairs:
    """Pairs closer than a cutoff, each once, without the excluded ones.

    The list is built on the CPU in double precision. It is a constant of differentiation, and
    works under every ``torch.func`` transform: under ``vmap`` one list serves the whole batch, so
    the caller must still apply the cutoff to each distance.

    Parameters
    ----------
    positions
        ``(frames, N, 3)`` [nm]; they may lie outside the box.
    box
        ``(frames, 3, 3)`` [nm] in reduced form, or None for an open system.
    cutoff
        [nm], at most half of every diagonal element of the box.
    excluded
        Keys from `exclusion_keys`.

    Raises
    ------
    BoxTooSmallError
        If the box is smaller than twice the cutoff.
    """
    n_particles = positions.shape[-2]

    def build(*frames: Tensor) -> Tensor:
        cells = None if box is None else frames[1]
        lists = [torch.empty(3, 0, dtype=torch.long)]
        for f in range(frames[0].shape[0]):
            cell = None if cells is None else cells[f].cpu().double().numpy()
            i, j = close_pairs(frames[0][f].cpu().double().numpy(), cell, cutoff)
            first, second = torch.from_numpy(i), torch.from_numpy(j)
            keep = _without(first, second, n_particles, excluded.cpu())
            lists.append(torch.stack([torch.full_like(first[keep], f), first[keep], second[keep]]))
        return torch.cat(lists, dim=1).to(frames[0].device)

    def union(triples: Tensor, n_frames: int) -> Tensor:
        folded = torch.stack([triples[0] % n_frames, triples[1], triples[2]])
        folded[1:] = torch.sort(folded[1:], dim=0).values
        result: Tensor = torch.unique(folded, dim=1)
        return result

    observed = (positions,) if box is None else (positions, box)
    frame, first, second = observe(build, union, *observed)
    return Pairs(first=first, second=second, frame=frame)


def close_pairs(
    positions: np.ndarray, box: np.ndarray | None, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """Half list of one frame as two int64 arrays."""
    if box is not None:
        require_room(box, cutoff)
    if len(positions) < 2:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    if not np.isfinite(positions).all():
        lost = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise InvalidInputError(
            f"positions: those of particle {lost} are {positions[lost].tolist()} nm, not finite "
            "numbers; look for the first step or frame in which this happens"
        )
    # The compiler takes a moment to be imported.
    from mdgraft.kernels.fused.half_list import half_list

    return half_list(positions, box, cutoff, n_threads=torch.get_num_threads())


def require_room(box: np.ndarray, cutoff: float) -> None:
    """Raise `BoxTooSmallError` unless a box ``(3, 3)`` is at least two cutoffs wide."""
    if np.any(np.diagonal(box) < 1.999999 * cutoff):
        raise BoxTooSmallError(
            f"box: has the diagonal {np.diagonal(box).tolist()} nm, but a cutoff of {cutoff:g} nm "
            f"needs at least {2 * cutoff:g} nm in every direction; use a larger box or a shorter "
            "cutoff"
        )
