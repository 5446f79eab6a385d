"""Many states as one, so that they are evaluated in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mdgraft.montecarlo.state import ChainState

#: Particles that are evaluated at a time.
_BATCH_PARTICLES = 8192


def join(states: Sequence[ChainState]) -> ChainState:
    """The chains of several states of one system, one state after the other; without forces."""

    def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None

    return dataclasses.replace(
        states[0],
        positions=torch.cat([state.positions for state in states]),
        box=joined([state.box for state in states]),
        discrete={
            name: torch.cat([state.discrete[name] for state in states])
            for name in states[0].discrete
        },
        present=joined([state.present for state in states]),
        energies=joined([state.energies for state in states]),
        forces=None,
        generator_state=None,
    )


def batches(states: Sequence[ChainState]) -> Iterator[ChainState]:
    """All states in their order, several of them joined at a time."""
    first = states[0]
    size = max(1, _BATCH_PARTICLES // max(1, first.n_chains * max(1, first.n_particles)))
    for start in range(0, len(states), size):
        yield join(states[start : start + size])
