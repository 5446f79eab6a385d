"""Lists without the tiles in which no pair interacts."""

from __future__ import annotations

import dataclasses

import numpy as np

from mdgraft.kernels.fused.clusters import TileList
from mdgraft.kernels.fused.spreading import compiled
from mdgraft.kernels.fused.tiles import ROW_FIELDS, ROWS

#: Kinds of particles are bits of a number.
_MOST_KINDS = 64


@dataclasses.dataclass(frozen=True)
class Kinds:
    """Kinds of particles, of which not all interact.

    Attributes
    ----------
    kind
        ``(N,)`` int64.
    interact
        ``(kinds, kinds)`` bool, symmetric.
    """

    kind: np.ndarray
    interact: np.ndarray


def thinned(tiles: TileList, kinds: Kinds) -> TileList:
    """The list without tiles that hold no pair of kinds that interact."""
    n_kinds = len(kinds.interact)
    if n_kinds > _MOST_KINDS or kinds.interact.all():
        return tiles
    bits = np.uint64(1) << np.arange(n_kinds, dtype=np.uint64)
    partners = (kinds.interact * bits).sum(axis=1, dtype=np.uint64)
    rows, kept, masks = _thinned(
        tiles.rows, tiles.tiles, tiles.masks, tiles.order, tiles.lanes, kinds.kind, bits, partners
    )
    return dataclasses.replace(tiles, rows=rows, tiles=kept, masks=masks)


@compiled
def _thinned(
    rows: np.ndarray,
    tiles: np.ndarray,
    masks: np.ndarray,
    order: np.ndarray,
    lanes: int,
    kind: np.ndarray,
    bits: np.ndarray,
    partners: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    present = np.zeros(len(order) // lanes, np.uint64)
    for k in range(len(order)):
        if order[k] >= 0:
            present[k // lanes] |= bits[kind[order[k]]]
    new_rows = np.empty((len(rows), ROW_FIELDS), np.int64)
    new_tiles, new_masks = np.empty_like(tiles), np.empty_like(masks)
    n_rows, n_tiles, n_masks = 0, 0, 0
    for row in range(len(rows)):
        four, begin, middle, end = rows[row, 0], rows[row, 2], rows[row, 3], rows[row, 4]
        wanted = np.uint64(0)
        for k in range(ROWS * four, ROWS * four + ROWS):
            if order[k] >= 0:
                wanted |= partners[kind[order[k]]]
        first, first_mask = n_tiles, n_masks
        for tile in range(begin, end):
            if tile == middle:
                new_rows[n_rows, 3] = n_tiles
            if wanted & present[tiles[tile]]:
                new_tiles[n_tiles] = tiles[tile]
                n_tiles += 1
                if tile < middle:
                    new_masks[n_masks] = masks[rows[row, 5] + tile - begin]
                    n_masks += 1
        if middle >= end:
            new_rows[n_rows, 3] = n_tiles
        if n_tiles > first:
            new_rows[n_rows, 0], new_rows[n_rows, 1] = four, rows[row, 1]
            new_rows[n_rows, 2], new_rows[n_rows, 4] = first, n_tiles
            new_rows[n_rows, 5] = first_mask
            n_rows += 1
    return new_rows[:n_rows].copy(), new_tiles[:n_tiles].copy(), new_masks[:n_masks].copy()
