"""Alternating timings, and what comes out of them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a row is to be measured.

    Attributes
    ----------
    threads
        On both sides.
    dtype
        ``"float32"`` or ``"float64"``, of the graft.
    repeats
        Pairs that are timed.
    quick
        Smaller systems and fewer frames.
    output
        Folder of results, which also keeps systems that take long to build.
    device
        ``"cpu"`` or ``"cuda"``.
    protein_file
        PDB file that replaces the built protein, or None.
    """

    threads: int = 1
    dtype: str = "float64"
    repeats: int = 7
    quick: bool = False
    output: Path = Path("benchmark-results")
    device: str = "cpu"
    protein_file: Path | None = None


@dataclasses.dataclass(kw_only=True)
class Result:
    """One line of the table.

    Attributes
    ----------
    row
        Its name.
    work
        What the timed side computes.
    beside
        What the other side computes; empty if the time itself is the result.
    atoms
        Number of particles.
    ours, theirs
        Seconds of each repeat; pairs were measured one after the other.
    target
        What the project aims at: a ratio, or seconds if nothing is beside.
    note
        What a reader has to know, such as why there is no number.
    extra
        More numbers, for the JSON file.
    """

    row: str
    work: str
    beside: str = ""
    atoms: int = 0
    threads: int = 1
    dtype: str = ""
    device: str = "cpu"
    moves: str = ""
    ours: list[float] = dataclasses.field(default_factory=list)
    theirs: list[float] = dataclasses.field(default_factory=list)
    target: float | None = None
    note: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def values(self) -> list[float]:
        """Pairwise ratios, or seconds if nothing is beside."""
        if not self.beside:
            return self.ours
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        found = dataclasses.asdict(self) | {"unit": "ratio" if self.beside else "s"}
        if self.values:
            found |= {
                "median": statistics.median(self.values),
                "lowest": min(self.values),
                "highest": max(self.values),
                "ours_median": statistics.median(self.ours),
            }
        if self.theirs:
            found["theirs_median"] = statistics.median(self.theirs)
        return found


def described(settings: Settings, **more: Any) -> dict[str, Any]:
    """Fields of a `Result` that follow from the settings."""
    return {
        "threads": settings.threads,
        "dtype": settings.dtype,
        "device": settings.device,
        **more,
    }


def alternate(
    prepare: Callable[[int], None],
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each side, measured in turn: A B A B ...

    A machine that slows down for a while slows neighbours in time, so that the ratio of a pair
    is steadier than any of its members.

    Parameters
    ----------
    prepare
        Called before each round with its number, untimed: it moves the atoms.
    sides
        The computations.
    repeats
        Rounds that count.
    warm_up
        Rounds before, in which both sides plan transforms and fill caches.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for count in range(warm_up + repeats):
        prepare(count)
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            elapsed = time.perf_counter() - begin
            if count >= warm_up:
                found[name].append(elapsed)
    return found


class Moves:
    """Positions that differ in each round, so that no side can repeat an old answer.

    Parameters
    ----------
    start
        ``(..., N, 3)`` [nm].
    kind
        ``"step"``: as far as atoms move in a step of dynamics, so that neighbour lists may be
        kept. ``"rebuild"``: also all atoms together by more than any list's margin, which costs
        both sides a new list and changes no energy. Of several frames, each lies far from the one
        before, as those of a stored trajectory do.
    """

    kinds = ("step", "rebuild")

    def __init__(self, start: np.ndarray, kind: str) -> None:
        self.start = start
        self.kind = kind
        self._random = np.random.default_rng(1)

    def __call__(self, count: int) -> np.ndarray:
        """Positions of this round."""
        moved = self.start + 3e-4 * self._random.normal(size=self.start.shape)
        if self.kind == "rebuild":
            # Back and forth: one configuration is always 1 nm away from the next.
            places = np.arange(len(moved))[:, None, None] if moved.ndim == 3 else count
            moved += (1 - 2 * (places % 2)) * 0.3 + 0.02 * self._random.normal(size=3)
        return moved
