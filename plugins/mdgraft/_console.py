"""What the command line shows people: tables on standard output, progress on standard error."""

from __future__ import annotations

import math
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_COLOURS = {
    "agrees": "green",
    "works": "green",
    "differs": "bold red",
    "broken": "bold red",
    "unresolved": "yellow",
    "missing": "yellow",
    "skipped": "dim",
}


class ProgressReporter:
    """Shows progress on standard error: a bar on a terminal, a line for each message elsewhere.

    Call it with a message, how many steps are done, and how many there are (0 if unknown).
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._console = Console(stderr=True)
        self._last = ""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(command, total=None)

    def __enter__(self) -> ProgressReporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, message: str, done: int = 0, total: int = 0) -> None:
        """Report."""
        if self._console.is_terminal:
            text = escape(f"{self._command}: {message}")
            self._progress.update(self._task, description=text, completed=done, total=total or None)
        elif message != self._last:
            steps = f" ({done}/{total})" if total else ""
            print(f"{self._command}: {message}{steps}", file=sys.stderr, flush=True)
        self._last = message


def print_check(report: Any) -> None:
    """Show a report of the ``check`` service."""
    console = _console()
    state = f"; positions {report.positions}"
    sites = f", {report.n_virtual_sites} of them virtual sites" if report.n_virtual_sites else ""
    console.print(f"{escape(report.system)}: {report.n_particles} particles{sites}{escape(state)}")
    table = Table(box=None, pad_edge=False)
    for name in ("force", "quantity", "OpenMM", "graft", "difference", "tolerance", "verdict"):
        right = name in ("OpenMM", "graft", "difference", "tolerance")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in report.comparisons:
        what = row.quantity if row.quantity != "parameter" else row.detail
        what = what.removeprefix(f"{row.term}.")
        if row.quantity != "parameter" and row.detail:
            what += f" ({row.detail})"
        verdict = f"[{_COLOURS[row.status]}]{row.status}[/]"
        if row.status == "unresolved":
            verdict += f" (+-{_short(row.uncertainty)})"
        table.add_row(
            escape(row.term),
            escape(what),
            _number(row.host),
            _number(row.graft),
            _short(row.relative),
            _short(row.tolerance),
            verdict,
        )
    console.print(table)
    console.print(
        "Energies in kJ/mol; forces and box derivatives, as root mean squares, in kJ/mol/nm; "
        "parameters in kJ/mol for a change by their own magnitude. Differences are relative; "
        "OpenMM's box and parameter derivatives are extrapolated finite differences.",
        style="dim",
    )
    for remark in report.remarks:
        console.print(escape(remark), style="yellow")
    counts = {s: sum(r.status == s for r in report.comparisons) for s in _COLOURS}
    told = f"{len(report.comparisons)} comparisons: "
    told += ", ".join(f"{status} {n}" for status, n in counts.items() if n)
    verdict = "the graft agrees with OpenMM" if report.agrees else "THE GRAFT DIFFERS FROM OPENMM"
    console.print(f"{verdict}; {told}; {report.seconds:.1f} s")


def print_doctor(report: Any) -> None:
    """Show a report of the ``doctor`` service."""
    console = _console()
    table = Table(box=None, pad_edge=False)
    for name in ("what", "status", "found", "to do"):
        table.add_column(name, overflow="fold")
    for finding in report.findings:
        table.add_row(
            escape(finding.name),
            f"[{_COLOURS[finding.status]}]{finding.status}[/]",
            escape(finding.detail),
            escape(finding.remedy),
        )
    console.print(table)
    verdict = "mdgraft can work here" if report.healthy else "mdgraft CANNOT work here"
    console.print(f"{verdict}; what is missing is optional" if report.healthy else verdict)


def print_fit(result: Any) -> None:
    """Show the result of a fit, which knows its own summary."""
    console = _console()
    console.print(escape(result.summary()))


def _console() -> Console:
    console = Console()
    # A pipe has no width; lines are not to be broken there.
    return console if console.is_terminal else Console(width=200)


def _number(value: float) -> str:
    return f"{value:.10g}" if math.isfinite(value) else "-"


def _short(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "-"
