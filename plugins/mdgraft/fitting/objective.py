"""The averages of a fit as a function of its parameters: sampled, reweighted, remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mdgraft._errors import ConfigurationError, InsufficientOverlapError, SimulationError
from mdgraft.fitting.averages import Average, SampledSystem, exact_energy
from mdgraft.fitting.config import FitConfig
from mdgraft.fitting.host import AbstractSimulation
from mdgraft.fitting.journal import Evaluation, Journal
from mdgraft.fitting.parameters import Trainable
from mdgraft.fitting.samples import SampleStore
from mdgraft.fitting.targets import combine, load_function, requests

#: Called with what is going on, and how much of it is done and wanted.
Progress = Callable[[str, int, int], None]

# An optimiser that asks for known points this often in a row is going nowhere.
_MAX_IDLE = 50


class FitFinished(Exception):  # noqa: N818 - ends an optimiser from within; not an error
    """The fit is over, whatever the optimiser still wants to do."""

    def __init__(self, reason: str, final: Evaluation | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.final = final


class OptimizerStalled(Exception):  # noqa: N818 - ends one run of an optimiser; not an error
    """The optimiser asks for nothing new."""


class Objective:
    """Averages and residuals at any parameters.

    Each evaluation that the journal holds is answered from there, so an optimiser that is run again
    over the same journal takes the same path until it asks for something new.

    Parameters
    ----------
    config
        The fit.
    simulations
        The systems by name, their parameters tied.
    trainables
        The parameters, in order.
    journal
        Past and future evaluations.
    folder
        Where frames are kept.
    source
        Folder of the configuration, for user functions.
    progress
        Told what is going on.
    on_row
        Called after each new evaluation.
    """

    def __init__(
        self,
        config: FitConfig,
        simulations: Mapping[str, AbstractSimulation],
        trainables: Sequence[Trainable],
        journal: Journal,
        *,
        folder: Path,
        source: Path,
        progress: Progress,
        on_row: Callable[[], None],
    ) -> None:
        self.config = config
        self.trainables = list(trainables)
        self.rows: list[Evaluation] = []
        self._simulations = simulations
        self._journal = journal
        self._progress = progress
        self._on_row = on_row
        self._requests = requests(config)
        self._functions = {
            name: [load_function(f, source, simulations[name].potential) for f in request.functions]
            for name, request in self._requests.items()
        }
        self._stores = {
            name: SampleStore(folder / name, simulations[name], system)
            for name, system in config.systems.items()
            if not system.rigid and (self._requests[name].simple or self._requests[name].functions)
        }
        self._sampled: dict[str, SampledSystem] = {}
        self._known: dict[tuple[float, ...], Evaluation] = {}
        self._idle = 0

    # Parameters in units of their scale ---------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return [t.name for t in self.trainables]

    @property
    def scale(self) -> np.ndarray:
        """Typical sizes ``(P,)``; an optimiser sees parameters divided by these."""
        return np.array([t.scale for t in self.trainables])

    @property
    def start(self) -> np.ndarray:
        """Scaled starting point ``(P,)``."""
        return np.asarray(np.array([t.initial for t in self.trainables]) / self.scale)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Scaled lower and upper bounds, each ``(P,)``."""
        lower = np.array([t.lower for t in self.trainables]) / self.scale
        return lower, np.array([t.upper for t in self.trainables]) / self.scale

    def point(self, evaluation: Evaluation) -> np.ndarray:
        """Scaled parameters ``(P,)`` of an evaluation."""
        return np.asarray(np.array([evaluation.parameters[n] for n in self.names]) / self.scale)

    # Residuals ----------------------------------------------------------------------------------

    def residuals(self, evaluation: Evaluation) -> np.ndarray:
        """``(value - target) / uncertainty``, ``(K,)``."""
        return np.array(
            [
                (evaluation.values[name] - target.value) / target.uncertainty
                for name, target in self.config.targets.items()
            ]
        )

    def residual_errors(self, evaluation: Evaluation) -> np.ndarray:
        """Standard errors of the residuals, ``(K,)``."""
        return np.array(
            [
                evaluation.standard_errors[name] / target.uncertainty
                for name, target in self.config.targets.items()
            ]
        )

    def jacobian(self, evaluation: Evaluation) -> np.ndarray:
        """Derivatives of the residuals by the scaled parameters, ``(K, P)``."""
        rows = [
            [evaluation.gradients[name][p] / target.uncertainty for p in self.names]
            for name, target in self.config.targets.items()
        ]
        return np.asarray(np.array(rows) * self.scale)

    def loss(self, evaluation: Evaluation) -> float:
        """Half the sum of the squared residuals."""
        residuals = self.residuals(evaluation)
        return 0.5 * float(residuals @ residuals)

    def within(self, residuals: np.ndarray, errors: np.ndarray) -> bool:
        """Whether residuals ``(K,)`` of these standard errors mean that all targets are met."""
        criterion = self.config.convergence
        allowed = np.hypot(errors, 1.0) if criterion.target_uncertainty else errors
        return bool((np.abs(residuals) <= criterion.standard_errors * allowed).all())

    def met(self, evaluation: Evaluation) -> bool:
        """Whether every average is close enough to its target."""
        return self.within(self.residuals(evaluation), self.residual_errors(evaluation))

    # Evaluation ---------------------------------------------------------------------------------

    def evaluate(self, scaled: np.ndarray, *, fresh: bool = False) -> Evaluation:
        """Averages at scaled parameters ``(P,)``, clipped to the bounds.

        Frames at hand are reweighted if their effective sample size allows, and new ones are
        sampled if not, or if ``fresh``. A reweighted result that meets the targets is confirmed
        with fresh frames, and the fresh result is returned.

        Raises
        ------
        FitFinished
            If fresh frames meet the targets, or the iterations are used up.
        OptimizerStalled
            If nothing but known points is asked for.
        """
        if not np.isfinite(scaled).all():
            raise OptimizerStalled(f"the optimiser asks for {scaled.tolist()}")
        clipped = np.clip(scaled, *self.bounds) * self.scale
        point = tuple(float(value) for value in clipped)
        if not fresh and point in self._known:
            self._idle += 1
            if self._idle > _MAX_IDLE:
                self._idle = 0
                raise OptimizerStalled("the optimiser asks for known points only")
            return self._known[point]
        self._idle = 0
        evaluation = self._row(point, fresh)
        if self.met(evaluation):
            if not evaluation.resampled:
                evaluation = self._row(point, True)
            if self.met(evaluation):
                raise FitFinished("targets_met", evaluation)
        return evaluation

    def apply(self, evaluation: Evaluation) -> None:
        """Give every potential the parameters of an evaluation."""
        self._set([evaluation.parameters[name] for name in self.names])

    def _row(self, point: tuple[float, ...], fresh: bool) -> Evaluation:
        iteration = len(self.rows)
        if iteration >= self.config.convergence.max_iterations:
            raise FitFinished("max_iterations", None)
        replayed = iteration < len(self._journal.evaluations)
        if replayed:
            evaluation = self._journal.evaluations[iteration]
            self._check_replay(evaluation, point)
        else:
            evaluation = self._compute(iteration, point, fresh)
            self._journal.append(evaluation)
            for name, number in evaluation.samples.items():
                self._stores[name].prune(number)
        if evaluation.resampled:
            self._known.clear()
        self.rows.append(evaluation)
        self._known[point] = evaluation
        if not replayed:
            self._on_row()
        return evaluation

    def _check_replay(self, evaluation: Evaluation, point: tuple[float, ...]) -> None:
        stored = [evaluation.parameters[name] for name in self.names]
        if not np.allclose(stored, point, rtol=1e-9, atol=0.0):
            raise ConfigurationError(
                f"{self._journal.path}: iteration {evaluation.iteration} was at {stored}, but the "
                f"optimiser now goes to {list(point)}; other versions of scipy or torch may have "
                "been used. Start again without --resume"
            )

    def _compute(self, iteration: int, point: tuple[float, ...], fresh: bool) -> Evaluation:
        if not fresh and not self._sampled and self.rows:
            self._reload()
        averages = None
        if not fresh and self._sampled:
            self._set(point)
            averages = self._reweighted(iteration)
        resampled = averages is None
        if averages is None:
            self._sample(iteration, point)
            averages = self._averages(iteration)
        return self._evaluation(iteration, point, resampled, averages)

    def _set(self, point: Sequence[float]) -> None:
        for trainable, value in zip(self.trainables, point, strict=True):
            for system in trainable.systems:
                potential = self._simulations[system].potential
                with torch.no_grad():
                    dict(potential.named_parameters())[f"tied.{trainable.name}"].fill_(value)

    def _names_in(self, system: str) -> list[str]:
        return [t.name for t in self.trainables if system in t.systems]

    def _reweighted(self, iteration: int) -> dict[str, dict[str, Average]] | None:
        """Averages from the frames at hand, or None if they do not reach that far."""
        least = self.config.reweighting.min_effective_fraction
        for name, sampled in self._sampled.items():
            self._progress(f"iteration {iteration}: reweighting {name}", 0, 1)
            overlap = sampled.overlap()
            if not overlap.ok or overlap.effective_sample_size < least * overlap.n_frames:
                return None
        try:
            return self._averages(iteration)
        except InsufficientOverlapError:
            return None

    def _sample(self, iteration: int, point: tuple[float, ...]) -> None:
        number = self._next_set()
        self._set(point)
        values = dict(zip(self.names, point, strict=True))
        for name, store in self._stores.items():

            def report(done: int, wanted: int, name: str = name) -> None:
                self._progress(f"iteration {iteration}: sampling {name}", done, wanted)

            report(0, self.config.systems[name].frames)
            try:
                frames = store.draw(number, values, report)
            except SimulationError as error:
                raise SimulationError(
                    f"systems.{name}: sampling failed at {values}: {error}; narrower bounds or "
                    "smaller steps may help"
                ) from error
            self._sampled[name] = SampledSystem(
                self._simulations[name],
                frames,
                temperature=self.config.systems[name].temperature,
                names=self._names_in(name),
            )

    def _next_set(self) -> int:
        return sum(row.resampled for row in self.rows)

    def _reload(self) -> None:
        """Bring back the frames that the last evaluation used."""
        origin = next(row for row in reversed(self.rows) if row.resampled)
        self._set([origin.parameters[name] for name in self.names])
        for name, store in self._stores.items():
            self._sampled[name] = SampledSystem(
                self._simulations[name],
                store.load(origin.samples[name]),
                temperature=self.config.systems[name].temperature,
                names=self._names_in(name),
            )

    def _averages(self, iteration: int) -> dict[str, dict[str, Average]]:
        found: dict[str, dict[str, Average]] = {}
        for name, request in self._requests.items():
            if name in self._sampled:
                self._progress(f"iteration {iteration}: averaging {name}", 0, 1)
                simple, functions = self._sampled[name].averages(
                    request.simple, self._functions[name]
                )
                found[name] = dict(zip(request.simple, simple, strict=True))
                found[name] |= dict(zip(request.functions, functions, strict=True))
            elif request.simple:
                energy = exact_energy(self._simulations[name], self._names_in(name))
                found[name] = {"energy_per_molecule": energy}
        return found

    def _evaluation(
        self,
        iteration: int,
        point: tuple[float, ...],
        resampled: bool,
        averages: Mapping[str, Mapping[str, Average]],
    ) -> Evaluation:
        targets = combine(self.config, averages, self.names)
        for name, average in targets.items():
            numbers = [average.value, *average.gradient.values()]
            if not all(map(math.isfinite, numbers)) or math.isnan(average.standard_error):
                raise SimulationError(
                    f"targets.{name}: the average at {dict(zip(self.names, point, strict=True))} "
                    f"is {average.value:g} +- {average.standard_error:g} with gradient "
                    f"{average.gradient}; did the simulation blow up?"
                )
        overlaps = {name: sampled.overlap() for name, sampled in self._sampled.items()}
        number = self._next_set() if resampled else self._next_set() - 1
        return Evaluation(
            iteration=iteration,
            parameters=dict(zip(self.names, point, strict=True)),
            resampled=resampled,
            samples=dict.fromkeys(self._stores, number),
            frames={name: overlap.n_frames for name, overlap in overlaps.items()},
            values={name: a.value for name, a in targets.items()},
            standard_errors={name: a.standard_error for name, a in targets.items()},
            gradients={name: a.gradient for name, a in targets.items()},
            gradient_standard_errors={
                name: a.gradient_standard_error for name, a in targets.items()
            },
            effective_sample_sizes={n: o.effective_sample_size for n, o in overlaps.items()},
            entropy_sample_sizes={n: o.entropy_sample_size for n, o in overlaps.items()},
        )
