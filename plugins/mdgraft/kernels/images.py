"""Lists of interacting pairs over all periodic images, in any cell, periodic in any directions.

Where a cutoff exceeds half of a cell, a particle meets several images of another one, and images of
itself. The minimum image does not do there; pairs carry lattice translations instead.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.kernels.observe import observe
from mdgraft.kernels.pairs import close_pairs

# More images than real particles by this factor: a tree that looks from real particles alone.
_MANY_IMAGES = 4
# Images of one direction; more of them means that a cell is flat rather than small.
_MOST_IMAGES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePairs:
    """Pairs of particles and lattice translations, frame by frame.

    Attributes
    ----------
    first, second
        ``(pairs,)`` particle indices; the same in both where a particle meets its own image.
    frame
        ``(pairs,)`` frame of each pair.
    shifts
        ``(pairs, 3)`` whole numbers: how many box vectors lie between ``second`` and the image
        meant. They count from the positions as they are, inside the cell or not.
    """

    first: Tensor
    second: Tensor
    frame: Tensor
    shifts: Tensor

    def displacements(self, positions: Tensor, box: Tensor | None) -> Tensor:
        """Vectors ``(pairs, 3)`` from ``first`` to the image of ``second``.

        ``positions`` is ``(frames, N, 3)``, ``box`` ``(frames, 3, 3)`` or None.
        """
        vectors = positions[self.frame, self.second] - positions[self.frame, self.first]
        if box is None:
            return vectors
        return vectors + torch.einsum("pi,pij->pj", self.shifts, box[self.frame])


def image_pairs(
    positions: Tensor,
    box: Tensor | None,
    *,
    cutoff: float,
    pbc: tuple[bool, bool, bool] = (True, True, True),
    half: bool = True,
) -> ImagePairs:
    """Pairs closer than a cutoff, over all images.

    The list is built on the CPU in double precision. It is a constant of differentiation, and
    works under every ``torch.func`` transform: under ``vmap`` one list serves the whole batch, so
    the caller must still apply the cutoff to each distance.

    Parameters
    ----------
    positions
        ``(frames, N, 3)`` [nm]; they may lie outside the cell.
    box
        ``(frames, 3, 3)`` [nm], any three vectors that are linearly independent, also where a
        direction is not periodic; None for an open system.
    cutoff
        [nm]
    pbc
        Which box vectors are periods.
    half
        Each pair once; otherwise once from either side.

    Raises
    ------
    InvalidInputError
        If positions are not finite or a cell has no volume.
    """
    n_particles = positions.shape[-2]

    def build(*frames: Tensor) -> Tensor:
        lists = [torch.empty(6, 0, dtype=torch.long)]
        for f in range(frames[0].shape[0]):
            cell = None if box is None else frames[1][f].cpu().double().numpy()
            x = frames[0][f].cpu().double().numpy()
            found = torch.from_numpy(_one_frame(x, cell, cutoff, pbc, half))
            lists.append(torch.cat([torch.full_like(found[:1], f), found]))
        return torch.cat(lists, dim=1).to(frames[0].device)

    def union(rows: Tensor, n_frames: int) -> Tensor:
        result: Tensor = torch.unique(torch.cat([rows[:1] % n_frames, rows[1:]]), dim=1)
        return result

    if n_particles == 0:
        none = torch.empty(0, dtype=torch.long, device=positions.device)
        return ImagePairs(first=none, second=none, frame=none, shifts=positions.new_zeros(0, 3))
    observed = (positions,) if box is None else (positions, box)
    frame, first, second, *shifts = observe(build, union, *observed)
    return ImagePairs(
        first=first, second=second, frame=frame, shifts=torch.stack(shifts, 1).to(positions.dtype)
    )


def _one_frame(
    x: np.ndarray,
    box: np.ndarray | None,
    cutoff: float,
    pbc: tuple[bool, bool, bool],
    half: bool,
) -> np.ndarray:
    """Rows ``first, second, shift_x, shift_y, shift_z`` of one frame, int64."""
    n = len(x)
    if not np.isfinite(x).all():
        lost = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise InvalidInputError(
            f"positions: those of particle {lost} are {x[lost].tolist()} nm, not finite numbers; "
            "look for the first step or frame in which this happens"
        )
    wrapped, cells, images, parents, shifts = _with_images(x, box, cutoff, pbc)
    everything = np.concatenate([wrapped, images])
    if len(images) <= _MANY_IMAGES * n:
        i, j = close_pairs(everything, None, cutoff)
        # A pair of images is the image of a pair that is also found from a real particle.
        real = np.minimum(i, j) < n
        i, j = np.minimum(i, j)[real], np.maximum(i, j)[real]
        inside = j < n
        i = np.concatenate([i, j[inside]])
        j = np.concatenate([j, i[: len(j)][inside]])
    else:
        near = cKDTree(wrapped).sparse_distance_matrix(
            cKDTree(everything), cutoff, output_type="ndarray"
        )
        apart = near["i"] != near["j"]
        i, j = near["i"][apart].astype(np.int64), near["j"][apart].astype(np.int64)
    parent = np.concatenate([np.arange(n), parents])[j]
    shift = np.concatenate([np.zeros((n, 3), dtype=np.int64), shifts])[j]
    if half:
        # Of a pair and its reverse: the lower particle first, or of two images the later one.
        weight = shift @ np.array([1 << 40, 1 << 20, 1])
        keep = (i < parent) | ((i == parent) & (weight > 0))
        i, parent, shift = i[keep], parent[keep], shift[keep]
    # From the wrapped positions to those that came.
    shift = shift + cells[parent] - cells[i]
    return np.concatenate([np.stack([i, parent]), shift.T])


def _with_images(
    x: np.ndarray, box: np.ndarray | None, cutoff: float, pbc: tuple[bool, bool, bool]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Particles moved into the cell, by what, and all images that come within the cutoff of it.

    Returns the wrapped positions, the whole numbers of box vectors that were added to wrap, and of
    the images their positions, their particles and their translations.
    """
    n = len(x)
    nothing = np.zeros((n, 3), dtype=np.int64)
    if box is None or not any(pbc):
        empty = np.zeros(0, dtype=np.int64)
        return x, nothing, np.zeros((0, 3)), empty, np.zeros((0, 3), dtype=np.int64)
    volume = abs(np.linalg.det(box))
    lengths = np.linalg.norm(box, axis=1)
    if not np.isfinite(box).all() or not volume > 1e-9 * lengths.prod():
        raise InvalidInputError(
            f"box: {box.tolist()} nm spans no volume; wanted three linearly independent vectors, "
            "also where a direction is not periodic"
        )
    fractional = x @ np.linalg.inv(box)
    cells = np.where(pbc, -np.floor(fractional).astype(np.int64), 0)
    fractional = fractional + cells
    wrapped = x + cells @ box
    # Distances between opposite faces.
    heights = 1.0 / np.linalg.norm(np.linalg.inv(box), axis=0)
    # A little more, for what rounding does on the border.
    reach = np.where(pbc, cutoff * (1 + 1e-9) / heights + 1e-9, 0.0)
    if reach.max() > _MOST_IMAGES:
        raise InvalidInputError(
            f"box: {box.tolist()} nm is only {heights.min():g} nm wide, too thin for a cutoff of "
            f"{cutoff:g} nm"
        )
    parents, shifts = np.arange(n), nothing
    for axis in np.flatnonzero(pbc):
        extent = int(np.ceil(reach[axis]))
        steps = np.arange(-extent, extent + 1)
        place = fractional[parents, axis][:, None] + steps
        kept, step = np.nonzero((place >= -reach[axis]) & (place <= 1 + reach[axis]))
        parents, shifts = parents[kept], shifts[kept]
        shifts[:, axis] = steps[step]
    images = np.flatnonzero(shifts.any(axis=1))
    parents, shifts = parents[images], shifts[images]
    return wrapped, cells, wrapped[parents] + shifts @ box, parents, shifts
