"""Sets of frames on disk, drawn block by block."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdgraft._errors import ConfigurationError
from mdgraft.fitting._files import write_atomically, write_text_atomically
from mdgraft.fitting.config import SystemConfig
from mdgraft.fitting.host import AbstractSimulation
from mdgraft.frames import Frames

#: Called with the frames done and wanted.
Progress = Callable[[int, int], None]


class SampleStore:
    """Draws and keeps the sets of frames of one system.

    A set is a folder that holds the equilibrated state and one file for each block. Files appear
    complete or not at all, and each follows from the one before, so a set that was interrupted is
    continued from its last file.

    Parameters
    ----------
    folder
        Where the sets are kept.
    simulation
        Draws frames at its potential's present parameters.
    config
        How many, and how.
    """

    def __init__(self, folder: Path, simulation: AbstractSimulation, config: SystemConfig) -> None:
        self.folder = folder
        self.simulation = simulation
        self.config = config

    def draw(
        self, number: int, parameters: Mapping[str, float], progress: Progress | None = None
    ) -> Frames:
        """Draw set ``number``, or load what of it exists already.

        It starts from the end of set ``number - 1``, which must exist. ``parameters`` are those
        that the potential has now.
        """
        folder = self.folder / f"set_{number:04d}"
        label = folder / "parameters.json"
        text = json.dumps(dict(parameters))
        if folder.exists() and not (label.exists() and label.read_text() == text):
            shutil.rmtree(folder)  # Of a process that died before it wrote down anything else.
        folder.mkdir(parents=True, exist_ok=True)
        if not label.exists():
            write_text_atomically(label, text)
        state, interval = self._start(folder, number)
        parts: list[Frames] = []
        done, wanted, index = 0, self.config.frames, 0
        while done < wanted:
            size = min(self.config.block_frames, wanted - done)
            path = folder / f"block_{index:04d}.npz"
            if path.exists():
                frames, state = _load_block(path)
            else:
                drawn = self.simulation.sample_block(
                    index, size, state, interval=interval, stream=number
                )
                state = drawn[-1:]
                write_atomically(path, lambda p, f=drawn: _save_block(p, f))  # type: ignore[misc]
                frames = _without_velocities(drawn)
            parts.append(frames)
            done, index = done + size, index + 1
            if progress is not None:
                progress(done, wanted)
        return Frames.concatenate(parts)

    def load(self, number: int) -> Frames:
        """Load a complete set."""
        folder = self.folder / f"set_{number:04d}"
        paths = sorted(folder.glob("block_*.npz"))
        if not paths:
            raise ConfigurationError(f"{folder}: holds no frames; start again without --resume")
        return Frames.concatenate([_load_block(path)[0] for path in paths])

    def prune(self, number: int) -> None:
        """Remove the sets before ``number``."""
        for folder in sorted(self.folder.glob("set_*")):
            if int(folder.name.removeprefix("set_")) < number:
                shutil.rmtree(folder)

    def _start(self, folder: Path, number: int) -> tuple[Frames, float]:
        path = folder / "equilibrated.npz"
        if not path.exists():
            before = None
            if number > 0:
                earlier = self.folder / f"set_{number - 1:04d}"
                _, before = _load_block(sorted(earlier.glob("block_*.npz"))[-1])
            state = self.simulation.equilibrate(before, stream=number)
            interval = self.config.interval
            if interval == "auto":
                interval = self.simulation.measure_interval(state, stream=number)
            chosen = float(interval)
            write_atomically(path, lambda p: _save_block(p, state, interval=chosen))
        return _load_block(path)[1], float(_load_arrays(path)["interval"])


def _save_block(path: Path, frames: Frames, *, interval: float = 0.0) -> None:
    """Store positions, boxes, and the velocities of the last frame alone."""
    arrays: dict[str, Any] = {"positions": frames.positions.numpy()}
    if frames.box is not None:
        arrays["box"] = frames.box.numpy()
    if frames.velocities is not None:
        arrays["last_velocities"] = frames.velocities[-1:].numpy()
    with open(path, "wb") as stream:
        np.savez(
            stream,
            sampled=np.array(frames.sampled or ""),
            interval=np.array(interval),
            **arrays,
        )


def _load_arrays(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, EOFError, TypeError, ValueError) as error:
        arrays, reason = {}, str(error)
    else:
        reason = "arrays are missing"
    if not {"positions", "sampled", "interval"} <= arrays.keys():
        raise ConfigurationError(f"{path}: is damaged ({reason}); start again without --resume")
    return arrays


def _load_block(path: Path) -> tuple[Frames, Frames]:
    """Frames without velocities, and the last one with them."""
    archive = _load_arrays(path)
    box = torch.from_numpy(archive["box"]) if "box" in archive else None
    positions = torch.from_numpy(archive["positions"])
    velocities = None
    if "last_velocities" in archive:
        velocities = torch.from_numpy(archive["last_velocities"])
    sampled = str(archive["sampled"]) or None
    frames = Frames(positions=positions, box=box, sampled=sampled)
    last = Frames(
        positions=positions[-1:],
        box=None if box is None else box[-1:],
        velocities=velocities,
        sampled=sampled,
    )
    return frames, last


def _without_velocities(frames: Frames) -> Frames:
    return Frames(positions=frames.positions, box=frames.box, sampled=frames.sampled)
