"""Random numbers of many steps at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mdgraft.montecarlo.moves.base import normal_of

#: Drawn at a time, unless one step needs more.
_BLOCK = 1 << 14


class RandomNumbers:
    """Uniform numbers of a generator, drawn ahead of use.

    A call of the generator costs as much as hundreds of numbers, which are the same in one call or
    in many. What was not used is given back: the generator then is where drawing each number when
    it is used would have left it. Nobody else may use it in between.

    Parameters
    ----------
    step
        How many one step may use.
    deciding
        Those of a step whose logarithms are wanted.
    """

    def __init__(self, step: int, deciding: Sequence[slice]) -> None:
        self._step, self._deciding = step, deciding
        self._before = torch.empty(0)
        self._drawn = 0
        #: How many of those that were drawn last have been used.
        self.used = 0
        self._make_room(0)

    def _make_room(self, n_steps: int) -> None:
        self._room = torch.empty(3, n_steps * self._step, dtype=torch.float64, device="cpu")
        self._uniform, self._normal, logarithms = self._room
        shape = n_steps, self._step
        u, logarithms = self._uniform.view(shape), logarithms.view(shape)
        self._wanted = [(u[:, part], logarithms[:, part]) for part in self._deciding]

    def draw(self, generator: torch.Generator, most: int) -> np.ndarray:
        """The next numbers, those of one or more whole steps, in place of the last ones.

        Parameters
        ----------
        generator
            The same as before, unless all has been given back.
        most
            Number of steps that are still to be made.

        Returns
        -------
        numpy.ndarray
            ``(3, L)``: uniform numbers, their normal numbers, and the logarithms that are wanted.
        """
        self.give_back(generator)
        self._before = generator.get_state()
        n_steps = max(1, min(most, _BLOCK // self._step))
        self._drawn = n_steps * self._step
        if self._room.shape[1] != self._drawn:
            self._make_room(n_steps)
        torch.rand(self._drawn, generator=generator, out=self._uniform)
        normal_of(self._uniform, out=self._normal)
        for u, logarithms in self._wanted:
            torch.log(u, out=logarithms)
        return self._room.numpy()

    def give_back(self, generator: torch.Generator) -> None:
        """Leave the generator behind the last number that was used."""
        if self.used < self._drawn:
            generator.set_state(self._before)
            torch.rand(self.used, generator=generator, dtype=torch.float64, device="cpu")
        self._drawn = self.used = 0
