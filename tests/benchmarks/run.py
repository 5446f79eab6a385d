"""Benchmarks: ratios of times beside OpenMM, as a table, a plot and JSON.

Run with ``python tests/benchmarks/run.py --quick``; see the README beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openmm
import report
import torch
from peers import PEER_ROWS, PEERS, measure_peer
from rich.console import Console
from rows import ROWS
from timing import Result, Settings


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Times of mdgraft beside OpenMM's.")
    names = list(dict.fromkeys([*ROWS, *PEER_ROWS]))
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="on both sides")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "float64"), default=["float32", "float64"]
    )
    parser.add_argument("--repeats", type=int, help="pairs to time; 7, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="smaller systems, about a minute")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        default=[],
        help="also time these packages, each in a virtual environment of its own",
    )
    parser.add_argument("--peers-only", action="store_true", help="leave out all other rows")
    parser.add_argument("--gpu", action="store_true", help="also CUDA on both sides")
    parser.add_argument("--protein", type=Path, help="PDB file instead of the built protein")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    chosen = parser.parse_args()
    if min(chosen.threads) < 1 or (chosen.repeats is not None and chosen.repeats < 1):
        parser.error("--threads and --repeats take numbers of at least 1")
    return chosen


def measurements(chosen: argparse.Namespace) -> Iterator[Result]:
    """Measure everything that was asked for; what fails becomes a remark."""
    base = Settings(
        repeats=chosen.repeats or (3 if chosen.quick else 7),
        quick=chosen.quick,
        output=chosen.output,
        protein_file=chosen.protein,
    )
    rows = [] if chosen.peers_only else [name for name in chosen.only or ROWS if name in ROWS]
    for name in rows:
        row = ROWS[name]
        # What does not depend on these is measured once.
        threads = chosen.threads if row.per_dtype else chosen.threads[:1]
        for device in ("cpu", "cuda") if chosen.gpu and row.on_gpu else ("cpu",):
            for count in threads if device == "cpu" else threads[:1]:
                for dtype in chosen.dtype if row.per_dtype else chosen.dtype[:1]:
                    settings = dataclasses.replace(base, threads=count, dtype=dtype, device=device)
                    yield from measure(name, settings)
    for name in chosen.peers:
        for count in chosen.threads:
            progress(f"{name}, {count} thread(s)")
            yield from measure_peer(name, dataclasses.replace(base, threads=count), chosen.only)


def measure(name: str, settings: Settings) -> Iterator[Result]:
    """Measure one row with one choice of settings."""
    missing = cannot(settings.device)
    about = f"{name}, {settings.dtype}, {settings.threads} thread(s), {settings.device}"
    progress(about + (f": {missing}" if missing else ""))
    failed = Result(
        row=name,
        work="",
        threads=settings.threads,
        dtype=settings.dtype,
        device=settings.device,
        note=missing,
    )
    if missing:
        yield failed
        return
    torch.set_num_threads(settings.threads)
    begin = time.perf_counter()
    try:
        yield from ROWS[name].measure(settings)
    except Exception as error:
        # One row must not cost the others.
        failed.note = f"failed: {type(error).__name__}: {error}"
        yield failed
    progress(f"{about}: {time.perf_counter() - begin:.1f} s")


def cannot(device: str) -> str:
    """Why a device cannot be used, if so."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "not run: torch finds no CUDA device"
    platforms = openmm.Platform
    names = {platforms.getPlatform(i).getName() for i in range(platforms.getNumPlatforms())}
    return "" if "CUDA" in names else "not run: this OpenMM has no CUDA platform"


def progress(message: str) -> None:
    """Tell what is going on, apart from results."""
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Measure and report, also what there is when interrupted."""
    chosen = arguments()
    chosen.output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    try:
        for result in measurements(chosen):
            results.append(result)
    except KeyboardInterrupt:
        progress("interrupted")
    # A pipe has no width of its own, and folded columns are hard to read.
    terminal = sys.stdout.isatty()
    report.print_table(results, Console(width=None if terminal else 210))
    report.write_json(results, chosen.output / "results.json")
    report.write_plot(results, chosen.output / "results.png")
    progress(f"wrote results.json and results.png in {chosen.output}")


if __name__ == "__main__":
    main()
