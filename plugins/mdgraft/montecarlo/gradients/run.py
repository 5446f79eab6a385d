"""Estimates under way, which can be stored and go on."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.estimate import Estimate
from mdgraft.montecarlo._archive import load_tensors, save_tensors
from mdgraft.montecarlo.gradients.base import AbstractGradient, steps
from mdgraft.montecarlo.gradients.observing import ChainObservable, Observer
from mdgraft.montecarlo.gradients.parameters import Conjugates
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.samples import Update
from mdgraft.montecarlo.state import ChainState

_SAMPLER, _SERIES, _OWN = "sampler.", "series.", "own."


class AbstractRun(abc.ABC):
    """Chains, and what an estimator has gathered along them so far.

    `AbstractPathGradient.begin` makes one. `advance` goes on, `estimate` says what is known by
    now. A run that is stored (`save`) and loaded into one that was begun in the same way goes on
    as if it had never stopped, bit by bit.

    Parameters
    ----------
    sampler
        The chains, which the run drives.
    observable
        Maps the state of C chains to ``(C, *S)``.
    conjugates
        The parameters.
    stride
        Steps from one sample to the next.
    """

    def __init__(
        self, sampler: Metropolis, observable: ChainObservable, conjugates: Conjugates, stride: int
    ) -> None:
        self.sampler, self.conjugates, self.stride = sampler, conjugates, stride
        self.observer = Observer(observable, conjugates, sampler.state)
        self._series: dict[str, list[Tensor]] = {name: [] for name in self._series_shapes()}
        self._begun = False
        #: Where this run has left the chains.
        self._left = sampler.state

    def advance(self, n_samples: int) -> None:
        """Go on with the chains for more samples of each; the first call warms up before.

        Raises
        ------
        InvalidInputError
            For a count or a stride below one; or if the chains are not where this run has left
            them, or their energy has changed, since what was gathered then belongs to others.
        """
        following = steps(self.sampler, n_samples, self.stride)
        self._check_left()
        if not self._begun:
            self._begun = True
            self._warm_up()
        for updates, sample in following:
            for update in updates:
                self._follow(update)
            if sample:
                self._take(self.sampler.state)
        self._left = self.sampler.state

    def _check_left(self) -> None:
        left, now = self._left, self.sampler.state
        if now.step != left.step or not torch.equal(now.positions, left.positions):
            raise InvalidInputError(
                f"sampler: its chains were left after {left.step} steps and are now after "
                f"{now.step}, some of which this run has not followed to their end; let the run "
                "alone drive its sampler, and load what was stored, or begin another run, after "
                "an error"
            )
        _check_energies(left.energies, now.energies)

    @abc.abstractmethod
    def estimate(self) -> Estimate:
        """The estimate by all samples so far; raises `InvalidInputError` where there are none."""

    # What estimators do -----------------------------------------------------------------------

    @abc.abstractmethod
    def _warm_up(self) -> None:
        """Step through what comes before the first sample."""

    @abc.abstractmethod
    def _follow(self, update: Update) -> None:
        """Go through one update of the chains."""

    @abc.abstractmethod
    def _take(self, state: ChainState) -> None:
        """Take a sample: append to series."""

    @abc.abstractmethod
    def _series_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names of the series of samples, and the shape of one entry of each."""

    @abc.abstractmethod
    def _own_state(self) -> dict[str, Tensor]:
        """All else that later samples depend on, as tensors by name."""

    @abc.abstractmethod
    def _restore(self, values: Mapping[str, Tensor]) -> None:
        """Go on from what `_own_state` returned."""

    def _append(self, **entries: Tensor) -> None:
        for name, entry in entries.items():
            self._series[name].append(entry)

    def series(self, name: str) -> Tensor:
        """One series of the samples so far, time first."""
        entries = self._series[name]
        if entries:
            return torch.stack(entries)
        like = self.sampler.state.positions
        return like.new_zeros((0, *self._series_shapes()[name]), dtype=torch.float64)

    def _require_samples(self) -> None:
        if not next(iter(self._series.values())):
            raise InvalidInputError("run: has no samples yet; call advance(n_samples) first")

    # Storing ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The sampler's state and everything that was gathered, as tensors by name."""
        found = {_SAMPLER + name: value for name, value in self.sampler.state_dict().items()}
        found |= {_SERIES + name: self.series(name) for name in self._series}
        found |= {_OWN + name: value.detach().clone() for name, value in self._own_state().items()}
        found["begun"] = torch.tensor(self._begun)
        found["stride"] = torch.tensor(self.stride)
        found["parameters"] = _encoded(self.conjugates.names)
        return found

    def load_state_dict(self, values: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` of a run that was begun in the same way returned.

        Raises
        ------
        InvalidInputError
            If it is of another estimator, other parameters or other values of these, another
            stride or other chains.
        """
        own = self.state_dict()
        unlike = {k for k in own.keys() ^ values.keys() if not k.startswith(_SAMPLER)}
        if unlike:
            raise InvalidInputError(
                f"values: are not those of this estimator; only one side has {sorted(unlike)[:4]}"
            )
        for name in ("parameters", "stride"):
            if not torch.equal(own[name], values[name].to(own[name].device)):
                raise InvalidInputError(
                    f"values: hold {_shown(name, values[name])}, wanted {_shown(name, own[name])}; "
                    "begin the run as the stored one was"
                )
        for name in self._series:
            got, wanted = values[_SERIES + name].shape[1:], own[_SERIES + name].shape[1:]
            if got != wanted:
                raise InvalidInputError(
                    f"values: hold samples of {name} of shape {tuple(got)}, wanted {tuple(wanted)}"
                )
        below = _below(_SAMPLER, values)
        self.sampler.load_state_dict(below)
        _check_energies(below.get("state.energies"), self.sampler.state.energies)
        device = self.sampler.state.positions.device
        for name in self._series:
            self._series[name] = list(values[_SERIES + name].to(device).unbind(dim=0))
        self._begun = bool(values["begun"])
        self._restore({name: value.clone() for name, value in _below(_OWN, values).items()})
        self._left = self.sampler.state

    def save(self, path: str | Path) -> None:
        """Write `state_dict` to a NumPy ``.npz`` file of plain arrays."""
        save_tensors(path, self.state_dict())

    def load(self, path: str | Path) -> None:
        """Go on from what `save` wrote; any other file raises `InvalidInputError`."""
        self.load_state_dict(load_tensors(path))


class AbstractPathGradient(AbstractGradient):
    """An estimator that follows chains along their paths, and whose runs can be interrupted."""

    @abc.abstractmethod
    def begin(
        self,
        sampler: Metropolis,
        observable: ChainObservable,
        *,
        stride: int = 1,
        parameters: Sequence[str] | None = None,
    ) -> AbstractRun:
        """A run that has not moved yet; arguments and errors are those of `estimate`."""

    def estimate(
        self,
        sampler: Metropolis,
        observable: ChainObservable,
        n_samples: int,
        *,
        stride: int = 1,
        parameters: Sequence[str] | None = None,
    ) -> Estimate:
        """See `AbstractGradient.estimate`; `begin` raises what this estimator has to object."""
        run = self.begin(sampler, observable, stride=stride, parameters=parameters)
        run.advance(n_samples)
        return run.estimate()


def _check_energies(before: Tensor | None, now: Tensor | None) -> None:
    """Raise if the same configurations have other energies than before."""
    if before is None or now is None:
        return
    before = before.to(now.device)
    # As a sampler that is loaded tells rounding from other parameters.
    if bool(((now - before).abs() > 1e-6 * now.abs().clamp(min=1.0)).any()):
        raise InvalidInputError(
            "target: its energy has changed since the run has left its chains (by up to "
            f"{float((now - before).abs().max()):.3g} kJ/mol), so that later samples are of "
            "another distribution; begin another run for other parameters"
        )


def _below(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _encoded(names: Sequence[str]) -> Tensor:
    return torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)


def _shown(name: str, value: Tensor) -> str:
    numbers = value.reshape(-1).tolist()
    shown = ", ".join(bytes(numbers).decode().split("\n")) if name == "parameters" else numbers[0]
    return f"the {name} {shown}"
