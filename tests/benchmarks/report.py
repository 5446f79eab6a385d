"""The table on the terminal, the plot and the JSON file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import mdgraft
import openmm
import torch
from rich.console import Console
from rich.table import Table
from timing import Result

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_COLOURS = {"float32": "tab:blue", "float64": "tab:orange", "": "tab:gray"}


def seconds(value: float) -> str:
    """A time with a unit that suits it."""
    if value >= 1.0:
        return f"{value:.2f} s"
    return f"{1e3 * value:.2f} ms" if value >= 1e-3 else f"{1e6 * value:.1f} us"


def machine() -> dict[str, object]:
    """What numbers depend on."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cuda": cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "openmm": openmm.__version__,
        "mdgraft": mdgraft.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def print_table(results: Sequence[Result], console: Console) -> None:
    """Show every result."""
    table = Table(title="Ratio of times: the work in the second column / what it stands beside")
    left = ("row", "work", "beside", "moves", "note")
    columns = ("row", "work", "beside", "moves", "atoms", "dtype", "threads", "median", "range")
    for column in (*columns, "target", "time", "beside's time", "note"):
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for result in results:
        found = result.summary()
        show = (lambda x: f"{x:.3g}") if result.beside else seconds
        keys = ("ours_median", "theirs_median") if result.beside else ("", "")
        times = [found.get(key) for key in keys]
        device = "" if result.device == "cpu" else f" {result.device}"
        table.add_row(
            result.row + device,
            result.work,
            result.beside,
            result.moves,
            f"{result.atoms:,}" if result.atoms else "",
            result.dtype,
            str(result.threads),
            show(found["median"]) if result.values else "",
            f"{show(found['lowest'])} - {show(found['highest'])}" if result.values else "",
            "" if result.target is None else show(result.target),
            *("" if value is None else seconds(value) for value in times),
            result.note,
        )
    console.print(table)
    described = ", ".join(f"{key} {value}" for key, value in machine().items() if value)
    console.print(f"{described}. Times are those of this machine at this moment.", soft_wrap=True)


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write every result with the times of all repeats."""
    content = {"machine": machine(), "results": [result.summary() for result in results]}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def write_plot(results: Sequence[Result], path: Path) -> None:
    """Draw ratios with their ranges and targets, and growth if it was measured."""
    ratios = [r for r in results if r.beside and r.values and r.row != "growth"]
    grown = [r for r in results if r.row == "growth" and r.extra]
    if not ratios and not grown:
        return
    height = max(6.0, 1.2 + 0.2 * len(ratios))
    figure = plt.figure(figsize=(9.0 * bool(ratios) + 5.0 * bool(grown), height))
    figure.set_layout_engine("constrained")
    widths = [9.0] * bool(ratios) + [5.0] * bool(grown)
    grid = figure.add_gridspec(2, len(widths), width_ratios=widths)
    if ratios:
        _draw_ratios(figure.add_subplot(grid[:, 0]), ratios)
    if grown:
        above, below = (figure.add_subplot(grid[row, -1]) for row in range(2))
        _draw_growth(above, grown, "seconds_per_atom", 1e6, "time per atom [µs]")
        _draw_growth(below, grown, "peak_bytes", 1e-6, "peak memory [MB]")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_ratios(axes: Axes, results: Sequence[Result]) -> None:
    for place, result in enumerate(results):
        found = result.summary()
        middle, low, high = (found[key] for key in ("median", "lowest", "highest"))
        axes.errorbar(
            middle,
            place,
            xerr=[[middle - low], [high - middle]],
            marker="o",
            markersize=4,
            capsize=2,
            color=_COLOURS.get(result.dtype, "tab:gray"),
        )
        if result.target is not None:
            axes.plot([result.target] * 2, [place - 0.45, place + 0.45], color="tab:red")
    axes.set_yticks(range(len(results)), map(_label, results), fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("ratio of times: median, lowest and highest; red: target")
    for dtype in sorted({r.dtype for r in results} & {"float32", "float64"}):
        axes.plot([], [], "o", color=_COLOURS[dtype], label=dtype)
    axes.legend(fontsize=8)


def _label(result: Result) -> str:
    device = "" if result.device == "cpu" else f", {result.device}"
    moves = f", {result.moves}" if result.moves else ""
    # The usual other side goes without saying.
    beside = f" / {result.beside}" if result.beside.startswith("mdgraft") else ""
    return f"{result.row}: {result.work}{beside}{moves}, {result.threads}T{device}"


def _draw_growth(axes: Axes, results: Sequence[Result], key: str, scale: float, label: str) -> None:
    for dtype, threads in sorted({(r.dtype, r.threads) for r in results}):
        chosen = [r for r in results if (r.dtype, r.threads) == (dtype, threads)]
        axes.plot(
            [r.atoms for r in chosen],
            [scale * r.extra[key] for r in chosen],
            marker="o",
            color=_COLOURS.get(dtype),
            linestyle="-" if threads == 1 else "--",
            label=f"{dtype}, {threads} thread{'s' * (threads > 1)}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("atoms")
    axes.set_ylabel(label)
    axes.legend(fontsize=8)
