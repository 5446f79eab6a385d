"""Distances, angles and dihedrals as functions that expressions call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mdgraft.lepton import Call
from mdgraft.potentials import geometry

#: Functions of particles or groups, and the number of labels that they take.
GEOMETRY = {"distance": 2, "angle": 3, "dihedral": 4}
#: The same of points, given by three coordinates each.
POINT_FUNCTIONS = {f"point{name}": 3 * count for name, count in GEOMETRY.items()}


def measure(name: str, positions: Tensor, box: Tensor | None, particles: Tensor) -> Tensor:
    """A ``distance``, ``angle`` or ``dihedral`` of particles ``(n, 2 to 4)``: ``(frames, n)``."""
    if name == "distance":
        return geometry.distance(positions, box, *particles.unbind(-1))
    if name == "angle":
        return geometry.angle(positions, box, particles)
    return geometry.dihedral(positions, box, particles)


def measure_calls(
    calls: Sequence[Call],
    labels: Sequence[str],
    positions: Tensor,
    box: Tensor | None,
    particles: Tensor,
) -> dict[str, Tensor]:
    """Values of geometric functions by key, each ``(frames, items)``.

    ``particles`` ``(items, labels)`` says which particle each label stands for.
    """
    return {
        call.key: measure(
            call.name, positions, box, particles[:, [labels.index(a) for a in call.arguments]]
        )
        for call in calls
    }


def point_function(name: str, box: Tensor | None) -> Callable[..., Tensor]:
    """``pointdistance``, ``pointangle`` or ``pointdihedral`` of coordinates ``(frames, items)``."""
    kind = name.removeprefix("point")

    def function(*coordinates: Tensor) -> Tensor:
        broadcast: Any = torch.broadcast_tensors
        spread = broadcast(*coordinates)
        shape = spread[0].shape
        points = torch.stack(spread, dim=-1).reshape(-1, GEOMETRY[kind], 3)
        cells = box
        if box is not None:
            # There may be neither points nor boxes.
            times = points.shape[0] // max(box.shape[0], 1)
            cells = box[:, None].expand(-1, times, 3, 3).reshape(-1, 3, 3)
        particles = torch.arange(GEOMETRY[kind], device=points.device).unsqueeze(0)
        result: Tensor = measure(kind, points, cells, particles).reshape(shape)
        return result

    return function


def coordinates(
    labels: Sequence[str], positions: Tensor, particles: Tensor, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """Variables ``x1``, ``y1``, ... of the labels ``p1``, ..., each ``(frames, items)``."""
    found = {}
    for place in range(len(labels)):
        for axis, letter in enumerate("xyz"):
            name = f"{letter}{place + 1}"
            if name in wanted:
                found[name] = positions[:, particles[:, place], axis]
    return found
