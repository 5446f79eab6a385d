"""Several estimators of one gradient, side by side."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.estimate import Estimate
from mdgraft.montecarlo.gradients.base import AbstractGradient
from mdgraft.montecarlo.gradients.observing import ChainObservable
from mdgraft.montecarlo.metropolis import Metropolis

#: Entries of a gradient that tables and pictures show.
_SHOWN = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One estimator's result.

    Attributes
    ----------
    estimate
        Value, gradient, errors, bias class.
    seconds
        How long it took.
    """

    estimate: Estimate
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results of several estimators by name, and what they are compared with.

    Attributes
    ----------
    results
        By the name of the estimator.
    reference
        Gradients that are known, by parameter name; may be empty.
    """

    results: Mapping[str, Compared]
    reference: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def entries(self) -> Iterator[tuple[str, str, int]]:
        """Label, parameter and flat index of every entry of the gradient."""
        first = next(iter(self.results.values())).estimate
        for name, gradient in first.gradient.items():
            for index in range(gradient.numel()):
                place = [int(i) for i in torch.unravel_index(torch.tensor(index), gradient.shape)]
                yield (f"{name} {place}" if place else name), name, index

    def value(self, estimator: str, parameter: str, index: int = 0) -> tuple[float, float]:
        """One entry of the gradient and its standard error."""
        estimate = self.results[estimator].estimate
        return (
            float(estimate.gradient[parameter].reshape(-1)[index]),
            float(estimate.gradient_standard_error[parameter].reshape(-1)[index]),
        )

    def z_scores(self, parameter: str, index: int = 0) -> Tensor:
        """Differences in units of their standard errors, ``(E, E)`` for E estimators.

        Row less column. Each ran chains of its own, so that their errors are independent.
        """
        found = torch.tensor(
            [self.value(name, parameter, index) for name in self.results], dtype=torch.float64
        )
        values, errors = found[:, 0], found[:, 1]
        spread = (errors[:, None].square() + errors.square()).sqrt()
        difference = values[:, None] - values
        return torch.where(difference == 0, 0.0, difference / spread.clamp(min=1e-300))

    def reference_z(self, estimator: str, parameter: str, index: int = 0) -> float:
        """Deviation from the known gradient in standard errors; NaN where none is known."""
        if parameter not in self.reference:
            return math.nan
        value, error = self.value(estimator, parameter, index)
        exact = float(torch.as_tensor(self.reference[parameter]).reshape(-1)[index])
        return (value - exact) / error if error > 0 else (0.0 if value == exact else math.inf)

    def largest_z(self) -> float:
        """The largest z-score between any two estimators that are not called biased."""
        unbiased = [k for k, r in enumerate(self.results.values()) if r.estimate.bias != "biased"]
        largest = 0.0
        for _, parameter, index in self.entries():
            scores = self.z_scores(parameter, index)[unbiased][:, unbiased]
            largest = max(largest, float(scores.abs().max()) if len(unbiased) > 1 else 0.0)
        return largest

    def cost(self, estimator: str, parameter: str, index: int = 0) -> float:
        """Seconds for a standard error of one: ``SE^2`` times the time taken."""
        _, error = self.value(estimator, parameter, index)
        return error * error * self.results[estimator].seconds

    # For people -------------------------------------------------------------------------------

    def table(self) -> Any:
        """A ``rich.table.Table``; ``rich.print(comparison.table())`` shows it."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        known = bool(self.reference)
        for name in ("parameter", "estimator", "gradient", "standard error"):
            table.add_column(name, justify="left" if name[0] in "pe" else "right")
        for name in (["z to reference"] if known else []) + ["largest z", "SE^2 x seconds"]:
            table.add_column(name, justify="right")
        table.add_column("seconds", justify="right")
        table.add_column("bias")
        for shown, (label, parameter, index) in enumerate(self.entries()):
            if shown == _SHOWN:
                table.add_row("...")
                break
            scores = self.z_scores(parameter, index)
            for row, (name, result) in enumerate(self.results.items()):
                value, error = self.value(name, parameter, index)
                cells = [label if row == 0 else "", name, f"{value:.5g}", f"{error:.2g}"]
                if known:
                    cells.append(f"{self.reference_z(name, parameter, index):+.1f}")
                cells.append(f"{float(scores[row].abs().max()):.1f}")
                cells.append(f"{self.cost(name, parameter, index):.2g}")
                cells += [f"{result.seconds:.1f}", result.estimate.bias]
                table.add_row(*cells)
        return table

    def summary(self) -> str:
        """The table as plain text."""
        from rich.console import Console

        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    __str__ = summary

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw gradients with errors, costs and z-scores; one row for each entry.

        Parameters
        ----------
        path
            Where to write the picture; None to write none.

        Returns
        -------
        matplotlib.figure.Figure
            Made without pyplot, so that neither a display nor its global state is needed.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        chosen = list(self.entries())[: _SHOWN // 2]
        names = list(self.results)
        figure = Figure(figsize=(11.0, 0.9 + 2.3 * len(chosen)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(chosen), 3, squeeze=False, width_ratios=(1.3, 1.0, 1.0))
        for row, (label, parameter, index) in zip(axes, chosen, strict=True):
            self._draw_values(row[0], names, label, parameter, index)
            row[1].barh(
                range(len(names)),
                [max(self.cost(name, parameter, index), 1e-300) for name in names],
                color="#9dbfe3",
            )
            row[1].set_xscale("log")
            row[1].set_yticks(range(len(names)), [])
            row[1].invert_yaxis()
            row[1].set_xlabel("SE² × seconds")
            self._draw_scores(row[2], figure, names, parameter, index)
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure

    def _draw_values(
        self, axis: Any, names: list[str], label: str, parameter: str, index: int
    ) -> None:
        found = [self.value(name, parameter, index) for name in names]
        axis.errorbar(
            [value for value, _ in found],
            range(len(names)),
            xerr=[1.96 * error for _, error in found],
            fmt="o",
            color="#1f5fa8",
            capsize=3,
        )
        if parameter in self.reference:
            exact = float(torch.as_tensor(self.reference[parameter]).reshape(-1)[index])
            axis.axvline(exact, color="#c0392b", linewidth=1.2, label="reference")
            axis.legend(fontsize="small", frameon=False)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(f"d / d {label}, 95 % intervals")

    def _draw_scores(
        self, axis: Any, figure: Any, names: list[str], parameter: str, index: int
    ) -> None:
        scores = self.z_scores(parameter, index)
        image = axis.imshow(scores.numpy(), cmap="RdBu", vmin=-4.0, vmax=4.0)
        for i in range(len(names)):
            for j in range(len(names)):
                axis.text(j, i, f"{float(scores[i, j]):.1f}", ha="center", va="center", fontsize=7)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
        axis.set_yticks(range(len(names)), [])
        axis.set_title("z-scores", fontsize="small")
        figure.colorbar(image, ax=axis, shrink=0.8)


def compare(
    sampler: Metropolis,
    observable: ChainObservable,
    gradients: Mapping[str, AbstractGradient] | Sequence[AbstractGradient],
    n_samples: int | Mapping[str, int],
    *,
    stride: int = 1,
    parameters: Sequence[str] | None = None,
    reference: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Comparison:
    """Estimate one gradient in several ways, each with chains of its own.

    Parameters
    ----------
    sampler
        Where all start: its target, its moves as they are tuned, its present state. It is not run.
    observable
        Maps the state of C chains to ``(C, *S)``.
    gradients
        Estimators, by names of your choice or by those of their classes.
    n_samples
        Number of samples of each chain, for all or by name.
    stride, parameters
        See `AbstractGradient.estimate`; an estimator that lacks some parameter raises.
    reference
        The gradient where it is known, ``(*S, *shape)`` by parameter name.
    seed
        Of the first; each has another one.

    Raises
    ------
    InvalidInputError
        For no estimators, two of one name, or reference values of another shape.
    """
    if not isinstance(gradients, Mapping):
        names = [type(gradient).__name__ for gradient in gradients]
        if len(set(names)) != len(names):
            raise InvalidInputError(
                f"gradients: got {names}, of which some occur twice; pass a dictionary of names"
            )
        gradients = dict(zip(names, gradients, strict=True))
    if not gradients:
        raise InvalidInputError("gradients: got none, wanted one or more estimators")
    state = dataclasses.replace(sampler.state, generator_state=None)
    results: dict[str, Compared] = {}
    for k, (name, gradient) in enumerate(gradients.items()):
        count = n_samples if isinstance(n_samples, int) else n_samples[name]
        own = Metropolis(sampler.target, sampler.moves, state, seed=seed + k)
        start = time.perf_counter()
        estimate = gradient.estimate(own, observable, count, stride=stride, parameters=parameters)
        results[name] = Compared(estimate=estimate, seconds=time.perf_counter() - start)
    known = {n: torch.as_tensor(v, dtype=torch.float64) for n, v in (reference or {}).items()}
    first = next(iter(results.values())).estimate.gradient
    for name, value in known.items():
        if name not in first or value.numel() != first[name].numel():
            wanted = {n: tuple(g.shape) for n, g in first.items()}
            raise InvalidInputError(
                f"reference[{name!r}]: got shape {tuple(value.shape)}, wanted one of {wanted}"
            )
    return Comparison(results=results, reference=known)
