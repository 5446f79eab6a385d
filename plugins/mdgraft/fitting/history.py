"""The history of a fit as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from mdgraft.fitting._files import write_text_atomically
from mdgraft.fitting.objective import Objective


def history_table(objective: Objective) -> tuple[list[str], list[list[str]]]:
    """Column names and one row for each evaluation.

    ``iteration``, ``resampled`` (1 if frames were sampled at these parameters, 0 if reweighted to
    them), ``loss``, ``targets_met``; each target and its ``_standard_error``; each parameter; for
    each system ``frames_<system>``, ``effective_sample_size_<system>`` and
    ``entropy_sample_size_<system>``; ``d_<target>_d_<parameter>`` and its ``_standard_error``.
    """
    targets, parameters = list(objective.config.targets), objective.names
    systems = list(objective.rows[0].frames) if objective.rows else []
    header = ["iteration", "resampled", "loss", "targets_met"]
    for target in targets:
        header += [target, f"{target}_standard_error"]
    header += parameters
    for system in systems:
        header += [
            f"frames_{system}",
            f"effective_sample_size_{system}",
            f"entropy_sample_size_{system}",
        ]
    for target in targets:
        for parameter in parameters:
            name = f"d_{target}_d_{parameter}"
            header += [name, f"{name}_standard_error"]
    table = []
    for row in objective.rows:
        cells: list[float | int] = [
            row.iteration,
            int(row.resampled),
            objective.loss(row),
            int(objective.met(row)),
        ]
        for target in targets:
            cells += [row.values[target], row.standard_errors[target]]
        cells += [row.parameters[parameter] for parameter in parameters]
        for system in systems:
            cells += [
                row.frames[system],
                row.effective_sample_sizes[system],
                row.entropy_sample_sizes[system],
            ]
        for target in targets:
            for parameter in parameters:
                cells += [
                    row.gradients[target][parameter],
                    row.gradient_standard_errors[target][parameter],
                ]
        table.append([repr(cell) for cell in cells])
    return header, table


def write_history(objective: Objective, path: Path) -> None:
    """Replace ``history.csv``."""
    header, table = history_table(objective)
    write_text_atomically(path, _as_csv([header, *table]))


def _as_csv(rows: Sequence[Sequence[str]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()
