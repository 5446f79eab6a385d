"""Sets of particles that interact, listed frame by frame, as expressions see them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdgraft.lepton import Expression
from mdgraft.potentials.custom.points import POINT_FUNCTIONS, measure, point_function


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuples:
    """Interacting sets of particles.

    Attributes
    ----------
    frame
        ``(n,)`` frame of each set.
    particles
        ``(n, labels)`` particle indices.
    points
        ``(n, labels, 3)`` their positions [nm].
    box
        ``(n, 3, 3)`` box vectors [nm], or None.
    n_frames
        Number of frames.
    """

    frame: Tensor
    particles: Tensor
    points: Tensor
    box: Tensor | None
    n_frames: int

    def distance(self, first: int, second: int) -> Tensor:
        """Distances between two labels ``(n,)``."""
        return self._measure("distance", [first, second])

    def only(self, within: Tensor, cutoff: float) -> Tuples:
        """The same with some fixed arrangement within the cutoff in place of the other sets.

        Expressions need not be finite beyond a cutoff, and a mask on their values would turn
        infinite derivatives there into NaN.
        """
        n = self.points.shape[1]
        t = torch.arange(1, n + 1, dtype=self.points.dtype, device=self.points.device) / n
        # No three of these are on a line, no four in a plane.
        curve = 0.5 * cutoff * torch.stack([t, t**2, t**3], dim=-1)
        points = torch.where(within[:, None, None], self.points, curve)
        return dataclasses.replace(self, points=points)

    def variables(self, expression: Expression, labels: Sequence[str]) -> dict[str, Tensor]:
        """Coordinates ``x1``, ... and geometric functions that an expression uses, ``(n,)``."""
        found = {
            call.key: self._measure(call.name, [labels.index(a) for a in call.arguments])
            for call in expression.calls
        }
        for place in range(len(labels)):
            for axis, letter in enumerate("xyz"):
                if f"{letter}{place + 1}" in expression.variables:
                    found[f"{letter}{place + 1}"] = self.points[:, place, axis]
        return found

    def point_functions(self) -> dict[str, Callable[..., Tensor]]:
        """``pointdistance``, ``pointangle`` and ``pointdihedral`` of coordinates ``(n,)``."""

        def one_point_a_frame(name: str) -> Callable[..., Tensor]:
            function = point_function(name, self.box)
            n = self.particles.shape[0]
            return lambda *x: function(*(c.expand(n).unsqueeze(-1) for c in x)).squeeze(-1)

        return {name: one_point_a_frame(name) for name in POINT_FUNCTIONS}

    def sum(self, energies: Tensor) -> Tensor:
        """Add up over the sets of each frame: ``(frames,)``."""
        energies = energies.expand(self.particles.shape[0])
        return energies.new_zeros(self.n_frames).index_add(0, self.frame, energies)

    def _measure(self, name: str, places: Sequence[int]) -> Tensor:
        index = torch.tensor([places], device=self.points.device)
        return measure(name, self.points, self.box, index).squeeze(-1)


def in_every_frame(particles: Tensor, positions: Tensor, box: Tensor | None) -> Tuples:
    """The same sets ``(sets, labels)`` in all frames."""
    n_frames = positions.shape[0]
    frame = torch.arange(n_frames, device=positions.device).repeat_interleave(particles.shape[0])
    return by_frame(frame, particles.repeat(n_frames, 1), positions, box)


def by_frame(frame: Tensor, particles: Tensor, positions: Tensor, box: Tensor | None) -> Tuples:
    """Sets ``(n, labels)`` of the frames ``(n,)``; labels that are -1 have no position."""
    return Tuples(
        frame=frame,
        particles=particles,
        points=positions[frame[:, None], particles.clamp(min=0)],
        box=None if box is None else box[frame],
        n_frames=positions.shape[0],
    )
