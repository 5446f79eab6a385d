"""Metropolis-Hastings sampling of many chains at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError, UnsupportedDerivativeError, WrongEnsembleError
from mdgraft.ensembles.recompute import leaves_of
from mdgraft.montecarlo._adaptation import Adaptation
from mdgraft.montecarlo._archive import load_tensors, save_tensors
from mdgraft.montecarlo._arrays import ArrayChains, work_on_arrays
from mdgraft.montecarlo._counts import checked_count
from mdgraft.montecarlo._holding import Holding
from mdgraft.montecarlo._program import Program
from mdgraft.montecarlo.moves.base import AbstractMove, uniform
from mdgraft.montecarlo.samples import Samples, StackedStates, Update
from mdgraft.montecarlo.state import PATHWISE, ChainState
from mdgraft.montecarlo.target import Target
from mdgraft.montecarlo.transition import Transition, transition

_STATE, _MOVE = "state.", "move."


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoveStatistics:
    """Counts of one move.

    Attributes
    ----------
    attempts, acceptances
        ``(C,)`` int64, for each chain.
    """

    attempts: Tensor
    acceptances: Tensor

    @property
    def acceptance(self) -> Tensor:
        """Fraction accepted ``(C,)``; NaN for a chain that never tried."""
        return self.acceptances.double() / self.attempts.double()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """Keep an `Update` for every update: proposals, probabilities, random numbers.

    Attributes
    ----------
    max_bytes
        Memory that the records may take. A run that would need more raises before it starts to
        grow; ``step()`` hands out updates one by one instead.
    """

    max_bytes: int = 1 << 30


class Metropolis:
    """Runs C chains with the moves given.

    One step makes one update, or with a `Sequence` of moves one of each. All chains are evaluated
    in one call of the energy. A run that is stored (`save`) and loaded goes on as if it had never
    stopped, bit by bit. Parameters of the energy may change between steps, as in training: the
    chains then go on with the new ones, from where they are. Changes that torch does not count, as
    those through ``.data`` or of a host's own parameters, must be told by `forget_energies`.

    Parameters
    ----------
    target
        The distribution.
    moves
        A move, or a `Mixture` or `Sequence` of moves. The sampler works on a copy, so that
        adaptation does not change the caller's.
    state
        Where the chains start. If it has a ``generator_state`` and no seed is given, the random
        stream goes on from there.
    seed
        Of the random stream; 0 by default.

    Raises
    ------
    InvalidInputError
        If target, moves and state do not fit together, or an energy at the start is not finite.
    WrongEnsembleError
        If a variable of the target is changed by no move, or if a move changes distances, or moves
        particles, that the host of the energy holds fixed.
    UnsupportedDerivativeError
        If positions, activities or the scale of a move require a gradient.
    """

    def __init__(
        self, target: Target, moves: AbstractMove, state: ChainState, *, seed: int | None = None
    ) -> None:
        for name, value, kind in (
            ("target", target, Target),
            ("moves", moves, AbstractMove),
            ("state", state, ChainState),
        ):
            if not isinstance(value, kind):
                raise InvalidInputError(
                    f"{name}: got {type(value).__name__}, wanted a {kind.__name__}"
                )
        self.target = target
        self.moves = moves.copied()
        self._components = _unique(self.moves.components)
        self._rows = _numbered(self._components)
        self._program: Program | None = None
        state.checked()
        target.check(state)
        self.moves.check(state, target)
        self._check_ensemble()
        for move in self._components:
            if move.has_scale and move.scale.requires_grad:
                raise UnsupportedDerivativeError(
                    f"scale: that of {move.name} requires a gradient; {PATHWISE}. To tune it by "
                    "gradient use mdgraft.montecarlo.tuning"
                )
        self._generator = torch.Generator()
        if state.generator_state is not None and seed is None:
            self._generator.set_state(state.generator_state.cpu())
        else:
            self._generator.manual_seed(0 if seed is None else seed)
        # The stream goes on in the generator; a state that is handed out must not repeat it.
        self._state, self._leaves = _start(target, state.replace(generator_state=None))
        self._holding = Holding(target, self._components, self._state)
        self._versions = _versions(target, self._leaves)
        self._adaptation = Adaptation(self._components)
        self.reset_statistics()

    def __setstate__(self, values: dict[str, Any]) -> None:
        # A copy has moves of its own.
        rows = _numbered(values["_components"])
        self.__dict__.update(values, _rows=rows, _program=None)

    # Running ----------------------------------------------------------------------------------

    @property
    def state(self) -> ChainState:
        """The present state, with that of the random stream."""
        self._renew()
        return self._state.replace(generator_state=self._generator.get_state())

    def forget_energies(self) -> None:
        """Compute the energies of the present state anew, after the energy has changed."""
        self._state, self._leaves = _start(self.target, self._state.replace(forces=None))
        self._versions = _versions(self.target, self._leaves)

    def _renew(self) -> None:
        """Energies by parameters that have changed since decide on nothing."""
        if _versions(self.target, self._leaves) != self._versions:
            self.forget_energies()

    @property
    def adjusted(self) -> bool:
        """Whether every move is accepted or rejected; otherwise samples are biased."""
        return all(move.adjusted for move in self._components)

    def step(self, *, adapt: bool = False) -> tuple[Update, ...]:
        """One step of every chain.

        Parameters
        ----------
        adapt
            Adapt the scales; only ever before sampling.

        Returns
        -------
        tuple of Update
            One for each update, in order.
        """
        self._renew()
        with torch.no_grad():
            return self._stepped(adapt)

    def _arrays(self) -> ArrayChains | None:
        """The chains as arrays, where energy and moves work on these; the steps are the same."""
        if self._holding.watches or not work_on_arrays(self.target, self.moves, self._state):
            return None
        if self._program is None:
            self._program = Program(self.moves, self._state, self._rows)
        return ArrayChains(self.target, self._program, self._state)

    def _run(
        self, arrays: ArrayChains, n_samples: int, stride: int, adapt: bool = False
    ) -> StackedStates:
        """Steps of the chains as arrays, counted."""
        before = self._state
        try:
            positions, energies = arrays.run(
                n_samples,
                stride,
                self._generator,
                self._counts.numpy(),
                self._next_scale if adapt else None,
            )
        finally:
            self._state = arrays.state
        return StackedStates(before, positions, energies, stride)

    def _stepped(self, adapt: bool) -> tuple[Update, ...]:
        done = []
        for move in self.moves.updates:
            # A scale that is adapted later must not change what was recorded.
            used = move.copied() if adapt else move
            noise = used.draw(self._state, self._generator)
            u = uniform(self._state, self._generator)
            result = transition(self._state, used, self.target, noise, u)
            self._state = result.after
            self._holding.look(move, self._state)
            self._count(move, result)
            if adapt:
                self._adapt(move, result)
            done.append(Update(move=used, noise=noise, u=u, transition=result))
        self._state = self._state.replace(step=self._state.step + 1)
        return tuple(done)

    def burn_in(self, n_steps: int, *, adapt: bool = True) -> None:
        """Run without keeping samples, and set the counts to zero afterwards.

        Parameters
        ----------
        n_steps
            Number of steps.
        adapt
            Bring the acceptance of each move with a scale to its ``target_acceptance`` by a
            stochastic approximation (Robbins and Monro, 1951) with steps ``2 / k^0.6``. The scales
            stay fixed afterwards: a chain whose scale depends on its past has another law.
        """
        n_steps = checked_count("n_steps", n_steps, 0)
        self._renew()
        with torch.no_grad():
            arrays = self._arrays() if n_steps else None
            if arrays is not None:
                self._run(arrays, 1, n_steps, adapt)
            else:
                for _ in range(n_steps):
                    self._stepped(adapt)
        self.reset_statistics()

    def sample(
        self, n_samples: int, *, stride: int = 1, record: Recording | None = None
    ) -> Samples:
        """Go on with the chains and keep samples.

        Parameters
        ----------
        n_samples
            Number of samples T of each chain.
        stride
            Steps from one to the next.
        record
            Keep every update as well; by default none.

        Raises
        ------
        InvalidInputError
            If the records would take more memory than allowed.
        """
        wanted, stride = checked_count("n_samples", n_samples), checked_count("stride", stride)
        states: Sequence[ChainState]
        updates: list[Update] = []
        self._renew()
        with torch.no_grad():
            arrays = None if record is not None else self._arrays()
            if arrays is not None:
                states = self._run(arrays, wanted, stride)
            else:
                states = self._sampled(wanted, stride, record, updates)
        return Samples(
            states=states,
            target=self.target,
            adjusted=self.adjusted,
            leaves=self._leaves,
            updates=updates,
        )

    def _sampled(
        self, n_samples: int, stride: int, record: Recording | None, updates: list[Update]
    ) -> list[ChainState]:
        """States that follow from steps on tensors; the updates are appended if recorded."""
        states = []
        for _ in range(n_samples):
            for _ in range(stride):
                found = self._stepped(adapt=False)
                if record is not None:
                    if not updates:
                        _check_memory(found, n_samples * stride, record)
                    updates.extend(found)
            states.append(self._state.replace(forces=None))
        return states

    # Counting and adapting --------------------------------------------------------------------

    @property
    def statistics(self) -> Mapping[str, MoveStatistics]:
        """Attempts and acceptances of each move by name, since the last reset."""
        return {
            move.name: MoveStatistics(
                attempts=self._counts[0, k] + self._rounds[k],
                acceptances=self._counts[1, k].clone(),
            )
            for k, move in enumerate(self._components)
        }

    @property
    def scales(self) -> Mapping[str, float]:
        """The scale of each move that has one, by name."""
        return {move.name: float(move.scale) for move in self._components if move.has_scale}

    def reset_statistics(self) -> None:
        """Set all counts to zero."""
        shape = 2, len(self._components) + 1, self._state.n_chains
        #: Attempts and acceptances; the last row is for compiled loops.
        self._counts = self._state.positions.new_zeros(shape, dtype=torch.long)
        #: Attempts of all chains together, which need no tensor.
        self._rounds = [0] * len(self._components)

    def _count(self, move: AbstractMove, result: Transition) -> None:
        components = move.components
        for k, component in enumerate(components):
            row = self._rows[id(component)]
            if len(components) == 1:
                self._rounds[row] += 1
                self._counts[1, row].add_(result.accepted)
            else:
                mine = result.component == k
                self._counts[0, row].add_(mine)
                self._counts[1, row].add_(mine & result.accepted)

    def _next_scale(self, k: int, scale: float, log_alpha: np.ndarray) -> float:
        return self._adaptation.scale(k, scale, log_alpha, self._state)

    def _adapt(self, update: AbstractMove, result: Transition) -> None:
        log_alpha, component = (t.cpu().numpy() for t in (result.log_alpha, result.component))
        for part, move in enumerate(update.components):
            mine = log_alpha[component == part]
            if move.has_scale and mine.size:
                k = self._rows[id(move)]
                move.rescale(self._next_scale(k, float(move.scale), mine))

    def _check_ensemble(self) -> None:
        """Raise if the target has a variable that no move changes."""
        changed = frozenset().union(*(move.changes for move in self._components))
        for what, given, name, move in (
            ("volume", self.target.pressure, "pressure", "Volume"),
            ("numbers", self.target.log_activity, "log_activity", "InsertionDeletion"),
        ):
            if given is not None and what not in changed:
                raise WrongEnsembleError(
                    f"moves: none changes the {what}, but the target has a {name}; add a {move} "
                    f"move, or leave {name} out"
                )

    # Storing ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """State, random stream, scales and counts as tensors by name."""
        found = {_STATE + name: value for name, value in self.state.state_dict().items()}
        for k, move in enumerate(self._components):
            prefix = f"{_MOVE}{move.name}."
            found[prefix + "attempts"] = self._counts[0, k] + self._rounds[k]
            found[prefix + "acceptances"] = self._counts[1, k].clone()
            if move.has_scale:
                found[prefix + "scale"] = move.scale.detach().clone()
                found[prefix + "adaptations"] = torch.tensor(self._adaptation.steps[k])
        return found

    def load_state_dict(self, values: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` of a sampler with the same moves returned.

        Raises
        ------
        InvalidInputError
            If the names are those of other moves, or the state is of another system.
        """
        own = self.state_dict()
        unlike = {k for k in own.keys() ^ values.keys() if not k.startswith(_STATE)}
        if unlike:
            raise InvalidInputError(
                f"values: are not those of these moves; only one side has {sorted(unlike)[:4]}"
            )
        state = ChainState.from_state_dict(
            {k.removeprefix(_STATE): v for k, v in values.items() if k.startswith(_STATE)}
        )
        if state.positions.shape != self._state.positions.shape or state.generator_state is None:
            raise InvalidInputError(
                f"values: hold positions {tuple(state.positions.shape)}, wanted "
                f"{tuple(self._state.positions.shape)} and a generator's state"
            )
        if _shapes(state) != _shapes(self._state):
            raise InvalidInputError(f"values: hold {_shapes(state)}, wanted {_shapes(self._state)}")
        device = self._state.positions.device
        loaded = _loaded(self.target, state.to(device))
        self._holding = Holding(self.target, self._components, loaded)
        self._state = loaded.replace(generator_state=None)
        self._generator.set_state(state.generator_state.cpu())
        for k, move in enumerate(self._components):
            prefix = f"{_MOVE}{move.name}."
            self._counts[0, k] = values[prefix + "attempts"].to(device)
            self._counts[1, k] = values[prefix + "acceptances"].to(device)
            self._rounds[k] = 0
            if move.has_scale:
                move.rescale(float(values[prefix + "scale"]))
                self._adaptation.steps[k] = int(values[prefix + "adaptations"])

    def save(self, path: str | Path) -> None:
        """Write `state_dict` to a NumPy ``.npz`` file of plain arrays."""
        save_tensors(path, self.state_dict())

    def load(self, path: str | Path) -> None:
        """Go on from what `save` wrote; any other file raises `InvalidInputError`."""
        self.load_state_dict(load_tensors(path))


def _start(target: Target, state: ChainState) -> tuple[ChainState, Sequence[Tensor]]:
    """The state with its energies, and the tensors that these depend on."""
    with torch.enable_grad():
        state = target.placed(state).detach()
        energies = target.energies(state)
        leaves = leaves_of([energies])
    energies = energies.detach()
    bad = (~torch.isfinite(energies)).nonzero()
    if bad.numel():
        raise InvalidInputError(
            f"state: the energy of chain {int(bad[0])} at the start is "
            f"{float(energies[bad[0]])} kJ/mol; start from possible configurations"
        )
    return state.replace(energies=energies), leaves


def _versions(target: Target, leaves: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Tells whether a tensor that energies depend on has been changed in place or replaced."""
    energy = target.energy
    tensors = list(leaves)
    if isinstance(energy, nn.Module):
        tensors += [*energy.parameters(), *energy.buffers()]
    return [(id(t), 0 if t.is_inference() else t._version) for t in tensors]


def _shapes(state: ChainState) -> dict[str, tuple[int, ...]]:
    """What two states of one system have in common."""
    named = {"positions": state.positions, "box": state.box, "present": state.present}
    named |= {f"discrete[{name!r}]": value for name, value in state.discrete.items()}
    return {name: tuple(value.shape) for name, value in named.items() if value is not None}


def _loaded(target: Target, state: ChainState) -> ChainState:
    """A state that was stored, with energies of this target if those stored are of another."""
    if state.energies is None:
        return state
    with torch.no_grad():
        energies = target.energies(state)
    # Rounding must not change a run that goes on; other parameters do.
    close = (energies - state.energies).abs() <= 1e-6 * energies.abs().clamp(min=1.0)
    return state if bool(close.all()) else _start(target, state.replace(forces=None))[0]


def _numbered(moves: Sequence[AbstractMove]) -> dict[int, int]:
    return {id(move): k for k, move in enumerate(moves)}


def _unique(moves: Sequence[AbstractMove]) -> list[AbstractMove]:
    """The moves, those whose name is taken renamed."""
    taken: set[str] = set()
    for move in moves:
        base, repeat = move.name, 0
        while move.name in taken:
            repeat += 1
            move.name = f"{base}_{repeat}"
        taken.add(move.name)
    return list(moves)


def _check_memory(updates: Sequence[Update], n_steps: int, record: Recording) -> None:
    tensors = [t for u in updates for t in (u.u, *u.noise.values(), u.transition.log_alpha)]
    for update in updates:
        result = update.transition
        for state in (result.before, result.proposed, result.after):
            tensors += state.state_dict().values()
    needed = n_steps * sum(t.numel() * t.element_size() for t in tensors)
    if needed > record.max_bytes:
        raise InvalidInputError(
            f"record: {n_steps} steps need about {needed / 2**20:.0f} MiB, above max_bytes = "
            f"{record.max_bytes / 2**20:.0f} MiB; take fewer steps, raise max_bytes, or use the "
            "updates that step() returns one by one"
        )
