"""The picture of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdgraft.fitting._files import write_atomically
from mdgraft.fitting.journal import Evaluation
from mdgraft.fitting.objective import Objective

_WIDTH, _HEIGHT = 4.4, 2.6
_SAMPLED, _REWEIGHTED, _TARGET = "#1f5fa8", "#9dbfe3", "#c0392b"


def write_report(objective: Objective, path: Path) -> None:
    """Draw targets, parameters and gradients over the iterations; one column for each target.

    Filled symbols are fresh samples, open ones reweighted. Bars are one standard error.
    """
    # The canvas is made directly, so that neither a display nor pyplot's global state is needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    targets, names = list(objective.config.targets), objective.names
    columns = max(len(targets), min(len(names), 3))
    parameter_rows = -(-len(names) // columns)
    n_rows = 1 + parameter_rows + len(names)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, target in zip(axes[0], targets, strict=False):
        _draw_target(axis, objective, target)
    for place, trainable in enumerate(objective.trainables):
        axis = axes[1 + place // columns][place % columns]
        values = [row.parameters[trainable.name] for row in objective.rows]
        _draw(axis, objective.rows, values, None)
        axis.set_ylabel(_with_unit(trainable.name, trainable.unit))
    for place, trainable in enumerate(objective.trainables):
        for axis, target in zip(axes[1 + parameter_rows + place], targets, strict=False):
            gradients = [row.gradients[target][trainable.name] for row in objective.rows]
            errors = [r.gradient_standard_errors[target][trainable.name] for r in objective.rows]
            _draw(axis, objective.rows, gradients, errors)
            axis.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
            axis.set_ylabel(f"d {_words(target)}\n/ d {trainable.name}", fontsize="small")
    for axis in axes.flat:
        if axis.get_visible():
            axis.set_xlabel("iteration")
            axis.xaxis.get_major_locator().set_params(integer=True)
    write_atomically(path, lambda p: figure.savefig(p, dpi=130, format="png"))


def _draw_target(axis: Any, objective: Objective, name: str) -> None:
    target = objective.config.targets[name]
    values = [row.values[name] for row in objective.rows]
    _draw(axis, objective.rows, values, [row.standard_errors[name] for row in objective.rows])
    low, high = target.value - target.uncertainty, target.value + target.uncertainty
    axis.axhspan(low, high, color=_TARGET, alpha=0.15, linewidth=0)
    axis.axhline(target.value, color=_TARGET, label="target", linewidth=1.2)
    axis.set_ylabel(_with_unit(_words(name), target.unit_name()))
    axis.legend(fontsize="small", frameon=False)


def _draw(
    axis: Any, rows: Sequence[Evaluation], values: Sequence[float], errors: Sequence[float] | None
) -> None:
    axis.set_visible(True)
    axis.plot([row.iteration for row in rows], values, color="0.8", linewidth=1.0, zorder=1)
    for resampled, label in ((True, "sampled"), (False, "reweighted")):
        chosen = [k for k, row in enumerate(rows) if row.resampled == resampled]
        if not chosen:
            continue
        colour = _SAMPLED if resampled else _REWEIGHTED
        axis.errorbar(
            [rows[k].iteration for k in chosen],
            [values[k] for k in chosen],
            yerr=None if errors is None else [errors[k] for k in chosen],
            fmt="o",
            color=colour,
            markerfacecolor=colour if resampled else "white",
            markersize=5,
            capsize=3,
            label=label,
        )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _with_unit(name: str, unit: str) -> str:
    return f"{name} [{unit}]" if unit else name
