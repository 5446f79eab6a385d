"""One pass of a compiled loop over the tiles of one frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from mdgraft.kernels.fused.clusters import TileList
from mdgraft.kernels.fused.spreading import compiled
from mdgraft.kernels.fused.threads import run_chunks
from mdgraft.kernels.fused.tiles import Loop

#: Fewer tiles than this are not worth a thread of their own.
_TILES_PER_THREAD = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What particles bring: the configuration, or a direction in which it changes.

    Attributes
    ----------
    positions
        ``(N, 3)`` float64 [nm].
    box
        ``(3, 3)`` float64 [nm]; zero in an open system.
    particle
        ``(m, N)`` quantities of particles, in the precision of the loop.
    """

    positions: np.ndarray
    box: np.ndarray
    particle: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gathered:
    """What a pass leaves in arrays that it is handed.

    Attributes
    ----------
    slopes
        ``(N, 3)`` derivatives in positions, or with no rows.
    particle
        ``(m, N)`` derivatives in quantities of particles, or with no rows.
    """

    slopes: np.ndarray
    particle: np.ndarray


def frame_pass(
    loop: Loop, tiles: TileList, layers: Sequence[Layer], numbers: np.ndarray, found: Gathered
) -> tuple[np.ndarray, np.ndarray]:
    """Run a loop over all tiles.

    Parameters
    ----------
    loop
        The loop; one of second order needs two layers.
    tiles
        The frame's list.
    layers
        The configuration and, at second order, the direction.
    numbers
        What the loop calls its numbers, in its precision.
    found
        Arrays to fill.

    Returns
    -------
    tuple of ndarray
        Sums over all pairs ``(loop.n_sums,)``, and the derivative in the box ``(3, 3)``.
    """
    kind, lanes = numbers.dtype, loop.lanes
    data = _aligned((tiles.n_clusters, loop.n_inputs, lanes), kind)
    origins = _origins(tiles.order, lanes, layers[0].positions, tiles.wraps, layers[0].box)
    own = origins
    for layer, k in zip(layers, range(0, loop.n_inputs, loop.n_inputs // len(layers)), strict=True):
        _fill(data, k, tiles.order, layer.positions, tiles.wraps, layer.box, own, layer.particle)
        own = np.zeros_like(origins)
    shifts = np.concatenate([tiles.images @ layer.box for layer in layers], axis=1)
    n_threads = max(1, min(torch.get_num_threads(), len(tiles.tiles) // _TILES_PER_THREAD))
    bounds = _even_rows(tiles.rows, n_threads)
    out = _aligned((n_threads, tiles.n_clusters, loop.n_outputs, lanes), kind)
    n_shifts = len(tiles.images)
    sums = np.zeros((n_threads, loop.n_sums + 3 * n_shifts))

    def work(k: int) -> None:
        out[k].fill(0)
        loop.function(
            int(bounds[k]),
            int(bounds[k + 1]),
            tiles.rows.ctypes.data,
            tiles.tiles.ctypes.data,
            tiles.masks.ctypes.data,
            numbers.ctypes.data,
            shifts.ctypes.data,
            origins.ctypes.data,
            data.ctypes.data,
            out[k].ctypes.data,
            sums[k].ctypes.data,
        )

    run_chunks(work, n_threads)
    total = sums.sum(axis=0)
    change = _collect(out, tiles.order, tiles.wraps, found.slopes, found.particle)
    if len(found.slopes):
        change += tiles.images.T @ total[loop.n_sums :].reshape(n_shifts, 3)
    return total[: loop.n_sums], change


def _aligned(shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    """An array that begins where a vector may; torch sees to that, numpy does not."""
    dtype = torch.float64 if kind == np.float64 else torch.float32
    array: np.ndarray = torch.empty(shape, dtype=dtype).numpy()
    return array


def _even_rows(rows: np.ndarray, n: int) -> np.ndarray:
    """Where to cut rows so that each part has about as many tiles."""
    ends = rows[:, 4]
    last = ends[-1] if len(ends) else 0
    cuts = np.searchsorted(ends, last * np.arange(1, n) / n)
    return np.concatenate([[0], cuts, [len(rows)]])


@compiled
def _origins(
    order: np.ndarray, lanes: int, positions: np.ndarray, wraps: np.ndarray, cell: np.ndarray
) -> np.ndarray:
    """Where the first particle of each cluster is, ``(clusters, 3)``."""
    origins = np.zeros((len(order) // lanes, 3))
    for c in range(len(origins)):
        i = order[c * lanes]
        if i >= 0:
            for k in range(3):
                shift = wraps[i, 0] * cell[0, k] + wraps[i, 1] * cell[1, k]
                origins[c, k] = positions[i, k] - shift - wraps[i, 2] * cell[2, k]
    return origins


@compiled
def _fill(
    data: np.ndarray,
    first: int,
    order: np.ndarray,
    positions: np.ndarray,
    wraps: np.ndarray,
    cell: np.ndarray,
    origins: np.ndarray,
    particle: np.ndarray,
) -> None:
    """Positions, from their cluster's origin, and quantities, in the order of clusters."""
    lanes = data.shape[2]
    for j in range(len(order)):
        i = order[j]
        c, lane = j // lanes, j % lanes
        if i < 0:
            for k in range(3 + len(particle)):
                data[c, first + k, lane] = 0
            continue
        a, b, c3 = wraps[i, 0], wraps[i, 1], wraps[i, 2]
        for k in range(3):
            shift = a * cell[0, k] + b * cell[1, k] + c3 * cell[2, k]
            data[c, first + k, lane] = positions[i, k] - shift - origins[c, k]
        for k in range(len(particle)):
            data[c, first + 3 + k, lane] = particle[k, i]


@compiled
def _collect(
    out: np.ndarray,
    order: np.ndarray,
    wraps: np.ndarray,
    slopes: np.ndarray,
    particle: np.ndarray,
) -> np.ndarray:
    """Sum over threads in the order of particles; returns what wrapping does to the box."""
    lanes = out.shape[3]
    change = np.zeros((3, 3))
    n_slopes = 3 if len(slopes) > 0 else 0
    for j in range(len(order)):
        i = order[j]
        if i < 0:
            continue
        c, lane = j // lanes, j % lanes
        for k in range(n_slopes):
            total = 0.0
            for thread in range(out.shape[0]):
                total += out[thread, c, k, lane]
            slopes[i, k] = total
            for m in range(3):
                change[m, k] -= wraps[i, m] * total
        for k in range(len(particle)):
            total = 0.0
            for thread in range(out.shape[0]):
                total += out[thread, c, n_slopes + k, lane]
            particle[k, i] = total
    return change
