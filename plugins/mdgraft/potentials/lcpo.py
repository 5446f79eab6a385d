"""Solvent-accessible surface area by linear combinations of pairwise overlaps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mdgraft._units import DIMENSIONLESS, NANOMETER, SURFACE_ENERGY
from mdgraft.kernels.observe import observe
from mdgraft.kernels.pairs import close_pairs
from mdgraft.kernels.periodic import minimum_image
from mdgraft.potentials.geometry import safe_norm
from mdgraft.potentials.term import AbstractTerm


class LCPO(AbstractTerm):
    """Surface tension times ``sum_i P1 S_i + P2 A_ij + P3 A_jk + P4 A_ij A_jk`` over overlaps.

    S is the area of a sphere, A_ij what sphere j buries of sphere i; j and k run over all spheres
    that overlap with i and with each other.

    Parameters
    ----------
    radius
        ``(N,)`` [nm], the solvent probe included; zero for particles that do not take part.
    p1, p2, p3, p4
        ``(N,)``; p4 in 1/nm^2.
    surface_tension
        ``()`` [kJ/mol/nm^2].
    periodic
        Whether distances are those of nearest periodic images.

    References
    ----------
    J. Weiser, P. S. Shenkin and W. C. Still, J. Comput. Chem. 20, 217 (1999), eq. 3.
    """

    def __init__(
        self,
        radius: Tensor,
        p1: Tensor,
        p2: Tensor,
        p3: Tensor,
        p4: Tensor,
        *,
        surface_tension: Tensor,
        periodic: bool = False,
    ) -> None:
        super().__init__(periodic=periodic)
        self.add_parameter("radius", radius, NANOMETER)
        for name, value in (("p1", p1), ("p2", p2), ("p3", p3)):
            self.add_parameter(name, value, DIMENSIONLESS)
        self.add_parameter("p4", p4, "nanometer**-2")
        self.add_parameter("surface_tension", surface_tension, SURFACE_ENERGY)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        radius = values["radius"]
        n_frames = positions.shape[0]
        frame, i, j, k = self._overlaps(positions, box, radius)

        def buried(at: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
            """What sphere ``by`` buries of sphere ``at``, and whether they overlap at all."""
            vectors = positions[frame, by] - positions[frame, at]
            if box is not None:
                vectors = minimum_image(vectors, box[frame])
            r = safe_norm(vectors)
            a, b = radius[at], radius[by]
            area = math.pi * a * (2 * a - r - (a * a - b * b) / torch.where(r == 0, 1.0, r))
            overlap = (r < a + b) & (at != by)
            return torch.where(overlap, area, 0.0), overlap

        # Rows with k = j are pairs, the others triples.
        area_ij, first = buried(i, j)
        area_jk, second = buried(j, k)
        pair = j == k
        triple = ~pair & first & second & buried(i, k)[1]
        two = values["p2"][i] * area_ij
        three = (values["p3"][i] + values["p4"][i] * area_ij) * area_jk
        terms = torch.where(pair, two, torch.where(triple, three, 0.0))
        overlaps = terms.new_zeros(n_frames).index_add(0, frame, terms)
        single = (values["p1"] * 4 * math.pi * radius * radius).sum()
        return values["surface_tension"] * (single + overlaps) + 0.0 * positions.sum(dim=(-2, -1))

    def _overlaps(
        self, positions: Tensor, box: Tensor | None, radius: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frame, i, j and k of each ordered pair (k = j) and triple of overlapping spheres."""

        def build(*frames: Tensor) -> Tensor:
            rows = [np.empty((4, 0), dtype=np.int64)]
            for f in range(frames[0].shape[0]):
                x = frames[0][f].cpu().double().numpy()
                spheres = frames[1][f].cpu().double().numpy()
                cell = frames[2][f].cpu().double().numpy() if box is not None else None
                found = _list(x, spheres, cell)
                rows.append(np.concatenate([np.full_like(found[:1], f), found]))
            return torch.from_numpy(np.concatenate(rows, axis=1)).to(frames[0].device)

        def union(rows: Tensor, n_frames: int) -> Tensor:
            folded = torch.cat([rows[:1] % n_frames, rows[1:]])
            result: Tensor = torch.unique(folded, dim=1)
            return result

        observed = [positions, radius.expand(positions.shape[:2])]
        rows = observe(build, union, *observed, *([] if box is None else [box]))
        frame, i, j, k = rows
        return frame, i, j, k


def _list(x: np.ndarray, radius: np.ndarray, box: np.ndarray | None) -> np.ndarray:
    """Rows i, j, k of one frame."""
    n = len(x)
    first, second = close_pairs(x, box, 2 * float(radius.max(initial=1e-3)))
    vectors = torch.from_numpy(x[second] - x[first])
    if box is not None:
        vectors = minimum_image(vectors, torch.from_numpy(box))
    r = vectors.norm(dim=-1).numpy()
    near = (r < radius[first] + radius[second]) & (radius[first] != 0) & (radius[second] != 0)
    i = np.concatenate([first[near], second[near]])
    j = np.concatenate([second[near], first[near]])
    order = np.lexsort((j, i))
    i, j = i[order], j[order]
    keys = i * n + j
    # Each edge i-j is followed by every edge j-k; those with an edge i-k are triples.
    count = np.bincount(i, minlength=n)
    start = np.concatenate([[0], np.cumsum(count)])
    edge = np.repeat(np.arange(len(i)), count[j])
    within = np.arange(len(edge)) - np.repeat(np.cumsum(count[j]) - count[j], count[j])
    k = j[start[j[edge]] + within]
    closed = np.isin(i[edge] * n + k, keys)
    edge, k = edge[closed], k[closed]
    return np.concatenate([np.stack([i, j, j]), np.stack([i[edge], j[edge], k])], axis=1)
