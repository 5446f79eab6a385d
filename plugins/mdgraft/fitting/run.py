"""Running a fit from its configuration to its results."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdgraft._errors import ConfigurationError
from mdgraft._services import hosts_with, service
from mdgraft.fitting._files import move_aside, write_atomically, write_text_atomically
from mdgraft.fitting.config import FitConfig, load_config
from mdgraft.fitting.history import write_history
from mdgraft.fitting.host import AbstractSimulation
from mdgraft.fitting.journal import Evaluation, Journal
from mdgraft.fitting.objective import FitFinished, Objective, OptimizerStalled, Progress
from mdgraft.fitting.optimizers import Optimizer, make_optimizer
from mdgraft.fitting.parameters import tie_parameters
from mdgraft.fitting.report import write_report
from mdgraft.fitting.targets import function_file

_JOURNAL = "journal.jsonl"
_REASONS = {
    "targets_met": "every average of fresh samples is within its standard error of its target",
    "max_iterations": "the iterations are used up; raise convergence.max_iterations and --resume",
    "stalled": "the optimiser finds nothing better; the targets may not be reachable together",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit found.

    Attributes
    ----------
    converged
        Whether fresh samples at the final parameters meet every target.
    reason
        ``"targets_met"``, ``"max_iterations"`` or ``"stalled"``.
    iterations
        Number of evaluations.
    parameters
        ``value``, ``standard_error``, ``initial``, ``bounds``, ``unit`` and ``selected`` entries of
        each parameter. The standard error is that caused by the noise of the averages alone; None
        when the targets do not determine the parameter.
    targets
        ``target``, ``uncertainty``, ``value``, ``standard_error``, ``unit`` and ``met`` of each
        target at the final parameters.
    output
        The folder that holds everything.
    history, report
        ``history.csv`` and ``report.png`` in it.
    systems
        The file with the fitted system, by name: ``system.xml`` for the first,
        ``system_<name>.xml`` for others.
    """

    converged: bool
    reason: str
    iterations: int
    parameters: dict[str, dict[str, Any]]
    targets: dict[str, dict[str, Any]]
    output: Path
    history: Path
    report: Path
    systems: dict[str, Path]

    def to_json(self) -> dict[str, Any]:
        """As plain data that ``json`` writes."""
        data = dataclasses.asdict(self)
        data |= {key: str(data[key]) for key in ("output", "history", "report")}
        data["systems"] = {name: str(path) for name, path in self.systems.items()}
        return data

    def summary(self) -> str:
        """Several lines for people."""
        verdict = "converged" if self.converged else "NOT CONVERGED"
        lines = [f"{verdict} after {self.iterations} iterations: {_REASONS[self.reason]}"]
        for name, row in self.targets.items():
            lines.append(
                f"  {name} = {row['value']:.6g} +- {row['standard_error']:.2g} {row['unit']}"
                f"  (target {row['target']:.6g}{'' if row['met'] else ', not met'})"
            )
        for name, row in self.parameters.items():
            error = row["standard_error"]
            lines.append(
                f"  {name} = {row['value']:.6g}{'' if error is None else f' +- {error:.2g}'} "
                f"{row['unit']}  (from {row['initial']:.6g})"
            )
        files = ", ".join(path.name for path in self.systems.values())
        lines.append(f"{self.output}: {files}, parameters.json, history.csv, report.png")
        return "\n".join(lines)


def run(
    config_path: str | Path,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    trust: bool = False,
    progress: Progress | None = None,
) -> FitResult:
    """Fit parameters to targets as a TOML file describes.

    Parameters
    ----------
    config_path
        The file; see `mdgraft.fitting.config.FitConfig`.
    output
        Folder to write into; ``<name of the file>_fit`` in the current folder if None. A previous
        run there is renamed to ``<folder>.1``, ``<folder>.2``, ... unless ``resume``.
    resume
        Continue the run in the output folder. The result is that of an uninterrupted run.
    trust
        Load files whose loading runs code.
    progress
        Called with what is going on, and how much of it is done and wanted.

    Returns
    -------
    FitResult
        Also when the fit did not converge.

    Raises
    ------
    ConfigurationError
        For a faulty configuration, or one that was changed before ``resume``.
    InvalidInputError
        For a faulty input file.
    UntrustedInputError
        If an input file would run code and ``trust`` is false.
    SimulationError
        If a simulation blows up.
    """
    source = Path(config_path)
    config = load_config(source)
    optimizer = _in_file(source, lambda: make_optimizer(config.optimizer))
    folder = Path(output) if output is not None else Path(f"{source.stem}_fit")
    report = progress or (lambda message, done, wanted: None)
    report("reading the systems", 0, 0)
    simulations = _open(source, config, trust)
    trainables = _in_file(source, lambda: tie_parameters(config.parameters, simulations))
    _prepare(folder, resume)
    journal = Journal(
        folder / _JOURNAL,
        {
            "format": 1,
            "configuration": config.digest(),
            "input files": {name: s.digest for name, s in simulations.items()}
            | _functions(config, source.parent),
        },
    )
    history = folder / "history.csv"

    def on_row() -> None:
        write_history(objective, history)
        report(_describe(objective), 0, 0)

    objective = _in_file(
        source,
        lambda: Objective(
            config,
            simulations,
            trainables,
            journal,
            folder=folder / "frames",
            source=source.parent,
            progress=report,
            on_row=on_row,
        ),
    )
    finished = _optimize(objective, optimizer)
    write_history(objective, history)
    return _write_results(objective, simulations, folder, finished)


def _optimize(objective: Objective, optimizer: Optimizer) -> FitFinished:
    """Run the optimiser, again from where it stops, until the fit is over."""
    start, stops = objective.start, 0
    try:
        objective.evaluate(start, fresh=True)
        while True:
            before = start
            with contextlib.suppress(OptimizerStalled):
                optimizer(objective, start)
            start = objective.point(_best(objective, fresh_only=False))
            stops = stops + 1 if np.allclose(start, before, rtol=1e-9, atol=1e-12) else 0
            if stops >= 2:
                return FitFinished("stalled", None)
            # New frames give an optimiser that is stuck in noise another direction.
            objective.evaluate(start, fresh=True)
    except FitFinished as finished:
        return finished


def _best(objective: Objective, *, fresh_only: bool) -> Evaluation:
    rows = [row for row in objective.rows if row.resampled or not fresh_only]
    return min(rows, key=objective.loss)


def _write_results(
    objective: Objective,
    simulations: Mapping[str, AbstractSimulation],
    folder: Path,
    finished: FitFinished,
) -> FitResult:
    final = finished.final or _best(objective, fresh_only=True)
    objective.apply(final)
    systems = {}
    for place, (name, simulation) in enumerate(simulations.items()):
        path = folder / ("system.xml" if place == 0 else f"system_{name}.xml")
        write_atomically(path, simulation.write)
        systems[name] = path
    write_report(objective, folder / "report.png")
    result = FitResult(
        converged=finished.reason == "targets_met",
        reason=finished.reason,
        iterations=len(objective.rows),
        parameters=_parameters(objective, final),
        targets=_targets(objective, final),
        output=folder,
        history=folder / "history.csv",
        report=folder / "report.png",
        systems=systems,
    )
    document = {
        "converged": result.converged,
        "reason": result.reason,
        "iterations": result.iterations,
        "iteration": final.iteration,
        "parameters": result.parameters,
        "targets": result.targets,
    }
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    write_text_atomically(folder / "parameters.json", text)
    return result


def _parameters(objective: Objective, final: Evaluation) -> dict[str, dict[str, Any]]:
    errors = _parameter_errors(objective, final)
    return {
        t.name: {
            "value": final.parameters[t.name],
            "standard_error": error,
            "unit": t.unit,
            "initial": t.initial,
            "bounds": [b if math.isfinite(b) else None for b in (t.lower, t.upper)],
            "selected": {name: dict(entries) for name, entries in t.selected.items()},
        }
        for t, error in zip(objective.trainables, errors, strict=True)
    }


def _parameter_errors(objective: Objective, final: Evaluation) -> list[float | None]:
    """What the noise of the averages does to the parameters, by linear propagation."""
    jacobian, errors = objective.jacobian(final), objective.residual_errors(final)
    if np.linalg.matrix_rank(jacobian, rtol=1e-8) < len(objective.names):
        return [None] * len(objective.names)
    inverse = np.linalg.pinv(jacobian)
    spread = np.sqrt(((inverse * errors) ** 2).sum(axis=1)) * objective.scale
    return [float(s) if math.isfinite(s) else None for s in spread]


def _targets(objective: Objective, final: Evaluation) -> dict[str, dict[str, Any]]:
    found = {}
    residuals, errors = objective.residuals(final), objective.residual_errors(final)
    for place, (name, target) in enumerate(objective.config.targets.items()):
        error = final.standard_errors[name]
        found[name] = {
            "target": target.value,
            "uncertainty": target.uncertainty,
            "value": final.values[name],
            "standard_error": error if math.isfinite(error) else None,
            "unit": target.unit_name(),
            "met": objective.within(residuals[[place]], errors[[place]]),
        }
    return found


def _open(source: Path, config: FitConfig, trust: bool) -> dict[str, AbstractSimulation]:
    hosts = hosts_with("simulation")
    found = {}
    for name, system in config.systems.items():
        key = f"{source}: systems.{name}"
        if system.host not in hosts:
            raise ConfigurationError(f"{key}.host: got {system.host!r}, wanted one of {hosts}")
        opener = service(system.host, "simulation")
        found[name] = _in_file(
            source,
            lambda o=opener, s=system: o(s, source.parent, trust=trust),
            prefix=f"systems.{name}.",
        )
        if config.systems[name].rigid:
            continue
        for target in config.targets.values():
            if target.system == name and target.observable in ("density", "heat_of_vaporization"):
                _require_pressure(key, found[name])
    return found


def _require_pressure(key: str, simulation: AbstractSimulation) -> None:
    if simulation.pressure is None:
        raise ConfigurationError(f"{key}.pressure: is missing, and a target needs it")


def _prepare(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"output: {folder} is a file, wanted a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _JOURNAL).exists():
            raise ConfigurationError(
                f"output: {folder} holds files that are not from a fit; name another folder"
            )
        if not resume:
            move_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _functions(config: FitConfig, folder: Path) -> dict[str, str]:
    """Fingerprints of the user's functions that lie beside the configuration."""
    found = {}
    for target in config.targets.values():
        path = function_file(target.observable, folder) if ":" in target.observable else None
        if path is not None:
            found[target.observable] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _in_file(source: Path, make: Any, *, prefix: str = "") -> Any:
    """Say in which file a configuration error is."""
    try:
        return make()
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {prefix}{error}") from error


def _describe(objective: Objective) -> str:
    row = objective.rows[-1]
    how = "sampled" if row.resampled else "reweighted"
    parameters = ", ".join(f"{name} {value:.6g}" for name, value in row.parameters.items())
    values = ", ".join(
        f"{name} {row.values[name]:.6g} +- {row.standard_errors[name]:.2g}" for name in row.values
    )
    return f"iteration {row.iteration} ({how}): {parameters}: {values}"
