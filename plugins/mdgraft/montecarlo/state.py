"""The state of a batch of Markov chains: all that a later step depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, UnsupportedDerivativeError
from mdgraft.montecarlo._archive import load_tensors, save_tensors
from mdgraft.montecarlo._counts import checked_count

_DISCRETE = "discrete."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainState:
    """C independent chains of one system, each in a configuration of its own.

    A state never changes; `replace`, `where` and indexing by chains make new ones. What a step
    draws at random comes from one generator for all chains, whose state is part of this one: a run
    that goes on from a stored state is the run that was never interrupted.

    Attributes
    ----------
    positions
        ``(C, N, 3)`` [nm], floating point; ``(C, 0, 3)`` for a lattice. Positions are never
        wrapped into the box: molecules stay whole.
    box
        ``(C, 3, 3)`` box vectors as rows [nm], or None.
    discrete
        Discrete variables by name, each ``(C, ...)`` integers or booleans, such as ``spins``,
        ``species`` or ``occupied``.
    present
        ``(C, S)`` booleans: which of S places for molecules hold one. None when the number of
        particles is fixed. Positions of absent molecules are arbitrary but finite.
    energies
        ``(C,)`` potential energies [kJ/mol], float64, or None when not known.
    forces
        ``(C, N, 3)`` forces [kJ/mol/nm] at these positions, or None when not known.
    step
        Number of steps taken.
    generator_state
        ``torch.Generator.get_state()`` of the random stream after that many steps, or None.

    Raises
    ------
    InvalidInputError
        If shapes or types disagree, or a number is not finite.
    UnsupportedDerivativeError
        If a tensor requires a gradient: none passes through accepting and rejecting.
    """

    positions: Tensor
    box: Tensor | None = None
    discrete: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    present: Tensor | None = None
    energies: Tensor | None = None
    forces: Tensor | None = None
    step: int = 0
    generator_state: Tensor | None = None

    @staticmethod
    def replicate(
        n_chains: int,
        *,
        positions: Tensor | None = None,
        box: Tensor | None = None,
        discrete: Mapping[str, Tensor] | None = None,
        present: Tensor | None = None,
    ) -> ChainState:
        """Start ``n_chains`` chains from one configuration.

        Parameters
        ----------
        n_chains
            C.
        positions
            ``(N, 3)`` [nm]; None for a lattice.
        box
            ``(3, 3)`` [nm], or None.
        discrete
            Discrete variables, each without the axis of chains.
        present
            ``(S,)`` booleans, or None.
        """
        checked_count("n_chains", n_chains)

        def repeated(name: str, value: Tensor) -> Tensor:
            if not torch.is_tensor(value):
                raise InvalidInputError(f"{name}: got {type(value).__name__}, wanted a tensor")
            return value.expand(n_chains, *value.shape).clone()

        if positions is None:
            positions = torch.zeros(0, 3, dtype=torch.float64)
        return ChainState(
            positions=repeated("positions", positions),
            box=None if box is None else repeated("box", box),
            discrete={k: repeated(k, v) for k, v in (discrete or {}).items()},
            present=None if present is None else repeated("present", present),
        ).checked()

    # Structure --------------------------------------------------------------------------------

    @property
    def n_chains(self) -> int:
        """Number of chains C."""
        return int(self.positions.shape[0])

    @property
    def n_particles(self) -> int:
        """Number of particles N, those of absent molecules included."""
        return int(self.positions.shape[1])

    @property
    def numbers(self) -> Tensor:
        """Number of molecules that are present ``(C,)``; of particles when that is fixed."""
        if self.present is None:
            return self.positions.new_full((self.n_chains,), self.n_particles, dtype=torch.long)
        return self.present.sum(dim=-1)

    def replace(self, **changes: Any) -> ChainState:
        """The same state with some attributes replaced.

        Energies and forces are forgotten when anything that they depend on is replaced.
        """
        if not changes.keys() <= _FIELDS:
            raise TypeError(f"ChainState has no {sorted(changes.keys() - _FIELDS)}")
        # As dataclasses.replace does, in a fraction of the time: every step makes several.
        made = object.__new__(ChainState)
        values = made.__dict__
        values.update(self.__dict__)
        if not changes.keys().isdisjoint(_DEPENDED_ON):
            values["energies"] = values["forces"] = None
        values.update(changes)
        return made

    def __getitem__(self, chains: slice | Tensor | list[int]) -> ChainState:
        """Some of the chains."""
        return self._map(lambda tensor: tensor[chains])

    def where(self, mask: Tensor, other: ChainState) -> ChainState:
        """``other`` for the chains where ``mask`` ``(C,)`` is true, this state for the rest.

        Energies or forces that either state lacks are lacking in the result.
        """
        if len(mask) == 1:
            # Nothing has to be copied.
            taken = bool(mask)
            return self._join(other, lambda mine, others: others if taken else mine)

        def chosen(mine: Tensor, others: Tensor) -> Tensor:
            return torch.where(mask.reshape(-1, *[1] * (mine.ndim - 1)), others, mine)

        return self._join(other, chosen)

    def put(self, chains: Tensor, other: ChainState) -> ChainState:
        """Replace the chains of these indices by those of ``other``, in order."""

        def written(mine: Tensor, others: Tensor) -> Tensor:
            return mine.index_copy(0, chains, others)

        return self._join(other, written)

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Positions ``(C, N, 3)`` and boxes ``(C, 3, 3)`` or None [nm], float64, for a host."""
        x, box = self.positions.detach().to("cpu", torch.float64).numpy(), self.box
        return x, None if box is None else box.detach().to("cpu", torch.float64).numpy()

    def detach(self) -> ChainState:
        """The same state without a graph."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> ChainState:
        """The same state on another device; the generator stays where it is."""
        return self._map(lambda tensor: tensor.to(device=device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> ChainState:
        return self.replace(
            positions=function(self.positions),
            box=None if self.box is None else function(self.box),
            discrete={name: function(value) for name, value in self.discrete.items()},
            present=None if self.present is None else function(self.present),
            energies=None if self.energies is None else function(self.energies),
            forces=None if self.forces is None else function(self.forces),
        )

    def _join(self, other: ChainState, function: Callable[[Tensor, Tensor], Tensor]) -> ChainState:
        def both(mine: Tensor | None, others: Tensor | None) -> Tensor | None:
            if mine is None or others is None:
                return None
            return mine if mine is others else function(mine, others)

        return self.replace(
            positions=both(self.positions, other.positions),
            box=both(self.box, other.box),
            discrete={
                name: value
                if value is other.discrete[name]
                else function(value, other.discrete[name])
                for name, value in self.discrete.items()
            },
            present=both(self.present, other.present),
            energies=both(self.energies, other.energies),
            forces=both(self.forces, other.forces),
        )

    # Checks -----------------------------------------------------------------------------------

    def checked(self) -> ChainState:
        """Itself, once shapes, types and values have been found to make sense."""
        x = self.positions
        if not (torch.is_tensor(x) and x.is_floating_point()):
            kind = x.dtype if torch.is_tensor(x) else type(x).__name__
            raise InvalidInputError(
                f"positions: got {kind}, wanted a tensor of floating-point numbers [nm]"
            )
        if x.ndim != 3 or x.shape[-1] != 3 or x.shape[0] < 1:
            raise InvalidInputError(
                f"positions: got shape {tuple(x.shape)}, wanted (chains, N, 3); "
                "ChainState.replicate(chains, positions=x) makes chains of one configuration"
            )
        n_chains = self.n_chains
        if self.box is not None and self.box.shape != (n_chains, 3, 3):
            raise InvalidInputError(
                f"box: got shape {tuple(self.box.shape)}, wanted ({n_chains}, 3, 3)"
            )
        for name, value in self.discrete.items():
            if not torch.is_tensor(value) or value.is_floating_point() or value.is_complex():
                kind = value.dtype if torch.is_tensor(value) else type(value).__name__
                raise InvalidInputError(
                    f"discrete[{name!r}]: got {kind}, wanted a tensor of integers or booleans"
                )
            if value.ndim < 1 or value.shape[0] != n_chains:
                raise InvalidInputError(
                    f"discrete[{name!r}]: got shape {tuple(value.shape)}, wanted ({n_chains}, ...)"
                )
        present = self.present
        if present is not None and (
            present.dtype != torch.bool or present.ndim != 2 or present.shape[0] != n_chains
        ):
            raise InvalidInputError(
                f"present: got {present.dtype} of shape {tuple(present.shape)}, wanted booleans "
                f"({n_chains}, places)"
            )
        for name, tensor in (("positions", x), ("box", self.box), ("energies", self.energies)):
            if tensor is None:
                continue
            if tensor.requires_grad:
                raise UnsupportedDerivativeError(f"{name}: requires a gradient; {PATHWISE}")
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidInputError(f"{name}: holds NaN or infinity")
        return self

    # Files ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors by name; `from_state_dict` is the way back."""
        named = {
            "positions": self.positions,
            "box": self.box,
            "present": self.present,
            "energies": self.energies,
            "forces": self.forces,
            "generator_state": self.generator_state,
            "step": torch.tensor(self.step),
        } | {_DISCRETE + name: value for name, value in self.discrete.items()}
        return {name: value.detach().clone() for name, value in named.items() if value is not None}

    @staticmethod
    def from_state_dict(values: Mapping[str, Tensor]) -> ChainState:
        """Rebuild what `state_dict` took apart.

        Raises
        ------
        InvalidInputError
            If something is missing, unknown or of a wrong shape.
        """
        known = {f.name for f in dataclasses.fields(ChainState)} - {"discrete"}
        unknown = [k for k in values if k not in known and not k.startswith(_DISCRETE)]
        if unknown or not {"positions", "step"} <= values.keys():
            raise InvalidInputError(
                f"values: got the names {sorted(values)}, wanted those of ChainState.state_dict()"
            )
        own = {k: v for k, v in values.items() if k in known and k != "step"}
        discrete = {
            k.removeprefix(_DISCRETE): v for k, v in values.items() if k.startswith(_DISCRETE)
        }
        state = ChainState(**own, discrete=discrete, step=int(values["step"]))
        return state.checked()

    def save(self, path: str | Path) -> None:
        """Write a NumPy ``.npz`` file of plain arrays."""
        save_tensors(path, self.state_dict())

    @staticmethod
    def load(path: str | Path) -> ChainState:
        """Read what `save` wrote; any other file raises `InvalidInputError`."""
        return ChainState.from_state_dict(load_tensors(path))


_DEPENDED_ON = frozenset({"positions", "box", "discrete", "present"})
_FIELDS = frozenset(field.name for field in dataclasses.fields(ChainState))

#: Why no gradient passes through a chain, and what to use.
PATHWISE = (
    "no gradient passes through accepting and rejecting: what automatic differentiation gives "
    "there is not the derivative of any average. Detach it to sample, and take the derivative of "
    "an average with one of mdgraft.montecarlo.gradients: Covariance() for stationary averages, "
    "Coupled() or Score() for burn-in, proposals and discrete states"
)
