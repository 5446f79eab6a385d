"""Changes of one entry of a discrete variable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal, uniform
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target

#: The name under which `ChainState.present` is changed.
PRESENT = "present"


class SiteChange(AbstractMove):
    """Give one site, chosen at random, another value, uniform among the others.

    Flips of spins, occupancies of a lattice gas, mutations of species.

    Parameters
    ----------
    variable
        Name of a discrete variable ``(C, ...)``; ``"present"`` stands for `ChainState.present`,
        whose weights are the target's activities.
    values
        The values that a site can have.
    name
        Under which the move is counted.

    Raises
    ------
    InvalidInputError
        For fewer than two values, or equal ones.
    """

    def __init__(
        self, variable: str, values: Sequence[int] = (0, 1), *, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.variable = variable
        self.values = torch.as_tensor([int(v) for v in values])
        if len(values) < 2 or len(set(values)) != len(values):
            raise InvalidInputError(
                f"values: got {list(values)}, wanted two or more, all different"
            )
        if variable == PRESENT:
            self.changes = frozenset({"numbers"})

    def _value(self, state: ChainState) -> Tensor | None:
        return state.present if self.variable == PRESENT else state.discrete.get(self.variable)

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for a variable that does not exist or has other values."""
        value = self._value(state)
        if value is None or value.ndim < 2:
            raise InvalidInputError(
                f"variable: no discrete variable {self.variable!r} of shape (chains, sites); there "
                f"are {sorted(state.discrete)}"
            )
        if not bool(torch.isin(value.long().cpu(), self.values).all()):
            raise InvalidInputError(
                f"values: {self.variable!r} has values other than {self.values.tolist()}"
            )

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """All: nothing moves."""
        return torch.ones(len(pairs), dtype=torch.bool)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Which site, and which other value, ``(C,)`` each."""
        return {"which": uniform(state, generator), "value": uniform(state, generator)}

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """Symmetric: the ratio is one."""
        value = self._value(state)
        assert value is not None
        shape, value = value.shape, value.flatten(1)
        n_sites = value.shape[1]
        site = (noise["which"] * n_sites).long().clamp(max=n_sites - 1)[:, None]
        values = self.values.to(value.device)
        present = (value.gather(1, site).long() == values).long().argmax(dim=1)
        others = len(values) - 1
        step = (noise["value"] * others).long().clamp(max=others - 1) + 1
        new = values[(present + step) % len(values)].to(value.dtype)[:, None]
        changed = value.scatter(1, site, new).reshape(shape)
        if self.variable == PRESENT:
            moved = state.replace(present=changed)
        else:
            moved = state.replace(discrete={**state.discrete, self.variable: changed})
        return Proposal(state=moved, log_ratio=noise["which"].new_zeros(state.n_chains))
