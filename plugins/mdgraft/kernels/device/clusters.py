"""Lists of tiles of particles within a cutoff, made by torch operations alone, on any device.

Particles are sorted into clusters of equal size: into slabs along x, strips along y and pieces
along z, each with the same number of particles (sort-tile-recursive packing; S. T. Leutenegger et
al., ICDE 1997, 497). Each cluster has a list of all clusters near it, every pair of clusters being
listed from both sides, so that whoever goes over a list writes to its own particles only. Only the
sizes of what is found come to the host, and the boxes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor

#: Particles of a cluster.
SIZE = 16
#: Clusters that are tried together first.
_GROUP = 8
#: Candidates that are looked at in one go; bounds memory.
_MOST = 1 << 22
#: What has another length in every list, and how much longer it may become in the same memory.
_GROWING = ("images", "segments", "image", "columns", "offsets", "mask", "masks")
_ROOM = 1.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterList:
    """Tiles whose particles may be within a cutoff, for F frames of C clusters.

    A row is a cluster of a frame, with the number ``frame * C + cluster``. A segment holds the
    tiles of a row with the same periodic image of the columns.

    Attributes
    ----------
    order
        ``(F, C * SIZE)`` particles in the order of clusters; `N` in places without one.
    places
        ``(F, N)`` where in that order each particle is.
    base
        ``(F, C * SIZE, 3)`` float64 [nm], what is taken off positions: the origin of the cluster,
        and box vectors.
    wraps
        ``(F, N, 3)`` float64, numbers of box vectors that were taken off.
    images
        ``(images, 3)`` float64, numbers of box vectors that each image adds.
    rows
        ``(F * C + 1,)`` int32, where the segments of each row begin.
    segments
        ``(segments + 1,)`` int64, where the tiles of each segment begin.
    image
        ``(segments,)`` int32.
    columns
        ``(tiles,)`` int32, rows that are the columns of tiles.
    offsets
        ``(tiles, 3)`` [nm], from the origin of the row to that of the column's image.
    mask
        ``(tiles,)`` int32, which of the masks a tile has; the first one is of no pair.
    masks
        ``(masks, SIZE)`` int32, for each particle of the row one bit a particle of the column that
        does not interact with it.
    """

    order: Tensor
    places: Tensor
    base: Tensor
    wraps: Tensor
    images: Tensor
    rows: Tensor
    segments: Tensor
    image: Tensor
    columns: Tensor
    offsets: Tensor
    mask: Tensor
    masks: Tensor

    @property
    def n_clusters(self) -> int:
        """Clusters of a frame."""
        return self.order.shape[1] // SIZE

    def roomy(self) -> ClusterList:
        """A copy with room for more tiles at the end, which nobody reads."""
        made = {}
        for field in dataclasses.fields(self):
            tensor: Tensor = getattr(self, field.name)
            room = tensor.shape[0]
            if field.name in _GROWING and (field.name != "images" or room > 1):
                room = math.ceil(_ROOM * room)
            made[field.name] = tensor.new_zeros(room, *tensor.shape[1:])
            made[field.name][: len(tensor)] = tensor
        return ClusterList(**made)

    def refill(self, other: ClusterList) -> bool:
        """Become another list in place; false, and unchanged, if there is no room."""
        pairs = []
        for field in dataclasses.fields(self):
            mine, new = getattr(self, field.name), getattr(other, field.name)
            fits = len(new) <= len(mine) if field.name in _GROWING else len(new) == len(mine)
            if not fits or new.shape[1:] != mine.shape[1:]:
                return False
            pairs.append((mine, new))
        for mine, new in pairs:
            mine[: len(new)] = new
        return True


def cluster_list(
    positions: Tensor, box: Tensor | None, cutoff: float, exclusions: Tensor, dtype: torch.dtype
) -> ClusterList:
    """Tiles of all pairs closer than a cutoff, from both sides.

    Parameters
    ----------
    positions
        ``(F, N, 3)`` float64 [nm], F and N > 0; they may lie outside the box. What is not finite is
        near nobody.
    box
        ``(F, 3, 3)`` float64 [nm], or None for an open system.
    cutoff
        [nm]; with a box, pairs of any number of images count. Infinite only without one.
    exclusions
        ``(exclusions, 2)`` pairs that tiles mask out, in every image and either order.
    dtype
        Of the offsets.
    """
    n_frames, n = positions.shape[:2]
    device = positions.device
    if box is None:
        wraps, wrapped = torch.zeros_like(positions), positions
        images = positions.new_zeros(1, 3)
        moves = positions.new_zeros(n_frames, 1, 3)
    else:
        wraps = torch.floor(positions @ torch.linalg.inv(box))
        wrapped = positions - wraps @ box
        images = _images(box, cutoff)
        moves = images @ box
    order = _packed(wrapped)
    n_clusters = order.shape[1] // SIZE
    # Each particle is there once, and places without one come last.
    places = torch.argsort(order, dim=1)[:, :n]
    sorted_ = taken(padded(wrapped, math.nan), order)
    clustered = sorted_.reshape(n_frames, n_clusters, SIZE, 3)
    lost = ~torch.isfinite(clustered)
    low = torch.where(lost, math.inf, clustered).amin(dim=2)
    high = torch.where(lost, -math.inf, clustered).amax(dim=2)
    # What rounding moves across the cutoff must not be missed.
    reach = cutoff * (1 + 1e-6) + 1e-9
    if math.isinf(cutoff):
        frame, row, column = (
            index.reshape(-1)
            for index in torch.meshgrid(
                *(torch.arange(k, device=device) for k in (n_frames, n_clusters, n_clusters)),
                indexing="ij",
            )
        )
        image = torch.zeros_like(frame)
    else:
        frame, row, column, image = _near(low, high, moves, reach)
        close = _close(clustered, moves, reach, frame, row, column, image)
        frame, row, column, image = (index[close] for index in (frame, row, column, image))
    # By row, then by image.
    n_images = len(images)
    key = ((frame * n_clusters + row) * n_images + image) * n_clusters + column
    key, by_key = torch.sort(key)
    frame, column, image = frame[by_key], column[by_key], image[by_key]
    of_segment, counts = torch.unique_consecutive(key // n_clusters, return_counts=True)
    segments = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    every_row = torch.arange(n_frames * n_clusters + 1, device=device)
    rows = torch.searchsorted(of_segment // n_images, every_row)
    middle = torch.where(low <= high, 0.5 * (low + high), 0.0)
    base = middle.repeat_interleave(SIZE, dim=1)
    if box is not None:
        base = base + taken(padded(wraps @ box, 0.0), order)
    row = (key // (n_clusters * n_images)) % n_clusters
    offsets = middle[frame, column] + moves[frame, image] - middle[frame, row]
    pair = (frame * n_clusters + row) * n_clusters + column
    mask, masks = _masks(exclusions, places, pair, n_clusters)
    return ClusterList(
        order=order,
        places=places,
        base=base,
        wraps=wraps,
        images=images,
        rows=rows.int(),
        segments=segments,
        image=(of_segment % n_images).int(),
        columns=(frame * n_clusters + column).int(),
        offsets=offsets.to(dtype),
        mask=mask,
        masks=masks,
    )


def padded(tensor: Tensor, value: float) -> Tensor:
    """``(F, n, k)`` with one more row of a value, for places without a particle."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, 1), value=value)


def taken(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows ``(F, n, k)`` of each frame in an order ``(F, m)``."""
    return torch.gather(tensor, 1, order.unsqueeze(-1).expand(*order.shape, tensor.shape[-1]))


def _images(box: Tensor, cutoff: float) -> Tensor:
    """Numbers of box vectors of all images that may be within a cutoff of the box itself."""
    widths = (1 / torch.linalg.inv(box).norm(dim=-2)).amin(dim=0).tolist()
    # Places within the box differ by less than one box vector.
    most = [math.ceil(cutoff / width) if width > 0 else 0 for width in widths]
    ranges = (range(-m, m + 1) for m in most)
    return box.new_tensor(list(itertools.product(*ranges)))


def _packed(wrapped: Tensor) -> Tensor:
    """Particles in the order of clusters ``(F, C * SIZE)``; N stands for none."""
    n_frames, n = wrapped.shape[:2]
    finite = torch.isfinite(wrapped).all(dim=-1, keepdim=True)
    known = torch.where(finite, wrapped, math.nan)
    # How many strips there are is a matter of speed only.
    seen = known[:1].nan_to_num(0.0)
    lengths = (seen.amax(dim=1) - seen.amin(dim=1) + 1e-3)[0].tolist()
    edge = (math.prod(lengths) * SIZE / max(n, 1)) ** (1 / 3)
    n_clusters = -(-n // SIZE)
    slabs = max(1, min(round(lengths[0] / edge), n_clusters))
    strips = max(1, min(round(lengths[1] / edge), -(-n_clusters // slabs)))
    pieces = -(-n_clusters // (slabs * strips))
    total = slabs * strips * pieces * SIZE
    missing = total - n
    padded = torch.cat([known, known.new_full((n_frames, missing, 3), math.nan)], dim=1)
    order = torch.arange(total, device=wrapped.device).expand(n_frames, total)
    for axis, parts in ((0, 1), (1, slabs), (2, slabs * strips)):
        keys = torch.gather(padded[..., axis], 1, order).reshape(n_frames, parts, -1)
        # What is missing or lost comes last.
        inner = torch.argsort(keys, dim=-1, stable=True)
        order = torch.gather(order.reshape(n_frames, parts, -1), 2, inner).reshape(n_frames, total)
    # Clusters without a particle are at the end of slabs and strips.
    order = order.clamp(max=n).reshape(n_frames, -1, SIZE)
    empty = (order == n).all(dim=-1)
    kept = torch.argsort(empty.int(), dim=1, stable=True)
    n_kept = int((~empty).sum(dim=1).amax())
    order = torch.gather(order, 1, kept[:, :n_kept, None].expand(-1, -1, SIZE))
    return order.reshape(n_frames, -1)


def _near(low: Tensor, high: Tensor, moves: Tensor, reach: float) -> tuple[Tensor, ...]:
    """Frames, rows, columns and images of clusters whose bounding boxes are close."""
    n_frames, n_clusters = low.shape[:2]
    group = _GROUP if n_clusters < 4096 else 4 * _GROUP
    n_groups = -(-n_clusters // group)
    missing = n_groups * group - n_clusters

    def padded(corner: Tensor, value: float) -> Tensor:
        extra = corner.new_full((n_frames, missing, 3), value)
        return torch.cat([corner, extra], dim=1)

    low, high = padded(low, math.inf), padded(high, -math.inf)
    lowest = low.reshape(n_frames, n_groups, group, 3).amin(dim=2)
    highest = high.reshape(n_frames, n_groups, group, 3).amax(dim=2)
    inner = torch.arange(group, device=low.device)
    found = []
    n_images = moves.shape[1]
    images_at_once = max(1, min(n_images, _MOST // (n_groups * n_groups)))
    frames_at_once = max(1, _MOST // (images_at_once * n_groups * n_groups))
    for start, first_image in itertools.product(
        range(0, n_frames, frames_at_once), range(0, n_images, images_at_once)
    ):
        some = slice(start, start + frames_at_once)
        move = moves[some, first_image : first_image + images_at_once, None, None]
        candidates = (_gap(lowest[some], highest[some], move) < reach**2).nonzero()
        for part in torch.split(candidates, _MOST // group**2):
            frame, image, i, j = (index[:, None, None] for index in part.unbind(-1))
            row = (i * group + inner[:, None]).expand(-1, group, group)
            column = (j * group + inner).expand(-1, group, group)
            frame, image = (frame + start).expand_as(row), (image + first_image).expand_as(row)
            corners = (low[frame, row], high[frame, row], low[frame, column])
            between = _between(*corners, high[frame, column], moves[frame, image])
            close = (between < reach**2).nonzero(as_tuple=True)
            found.append(torch.stack([t[close] for t in (frame, row, column, image)]))
    if not found:
        return tuple(torch.empty(4, 0, dtype=torch.long, device=low.device))
    return tuple(torch.cat(found, dim=1))


def _gap(low: Tensor, high: Tensor, move: Tensor) -> Tensor:
    """Squared distances ``(F, images, G, G)`` of bounding boxes to moved ones."""
    low, high = low[:, None], high[:, None]
    rows, columns = (low[:, :, :, None], high[:, :, :, None]), (low[:, :, None], high[:, :, None])
    return _between(*rows, *columns, move)


def _between(low: Tensor, high: Tensor, low_2: Tensor, high_2: Tensor, move: Tensor) -> Tensor:
    """Squared distance of two bounding boxes, the second of which is moved."""
    gap = torch.maximum(low_2 + move - high, low - high_2 - move).clamp(min=0)
    return (gap * gap).sum(dim=-1)


def _close(
    clustered: Tensor,
    moves: Tensor,
    reach: float,
    frame: Tensor,
    row: Tensor,
    column: Tensor,
    image: Tensor,
) -> Tensor:
    """Which tiles hold a pair within reach."""
    parts = [torch.zeros(0, dtype=torch.bool, device=row.device)]
    for start in range(0, len(row), _MOST // SIZE**2):
        some = slice(start, start + _MOST // SIZE**2)
        f = frame[some]
        there = clustered[f, column[some]] + moves[f, image[some]][:, None]
        vectors = there[:, None] - clustered[f, row[some]][:, :, None]
        squared = (vectors * vectors).sum(dim=-1)
        parts.append((squared < reach**2).any(dim=-1).any(dim=-1))
    return torch.cat(parts)


def _masks(
    exclusions: Tensor, places: Tensor, pair: Tensor, n_clusters: int
) -> tuple[Tensor, Tensor]:
    """Which mask each tile has, and masks; a particle is always masked from itself."""
    n_frames, n = places.shape
    own = torch.arange(n, device=places.device)
    first = torch.cat([exclusions[:, 0], exclusions[:, 1], own])
    second = torch.cat([exclusions[:, 1], exclusions[:, 0], own])
    # Pairs that are listed twice would be added twice.
    keys = torch.unique(first * n + second)
    first, second = keys // n, keys % n
    i, j = places[:, first], places[:, second]
    frames = torch.arange(n_frames, device=places.device)[:, None]
    key = ((frames * n_clusters + i // SIZE) * n_clusters + j // SIZE).reshape(-1)
    known, which = torch.unique(key, return_inverse=True)
    bits = torch.ones_like(key, dtype=torch.int32) << (j % SIZE).reshape(-1).int()
    masks = torch.zeros((len(known) + 1) * SIZE, dtype=torch.int32, device=places.device)
    masks.index_add_(0, (which + 1) * SIZE + (i % SIZE).reshape(-1), bits)
    place = torch.searchsorted(known, pair).clamp(max=len(known) - 1)
    mask = torch.where(known[place] == pair, place + 1, 0)
    return mask.int(), masks.reshape(-1, SIZE)
