"""Tensors by name in a file that holds arrays and nothing that could run."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a NumPy ``.npz`` file; it appears complete or not at all."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    try:
        with open(partial, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote; any other file raises `InvalidInputError`."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (zipfile.BadZipFile, EOFError, AttributeError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"path: {path} does not hold arrays that mdgraft.montecarlo saved ({error})"
        ) from error
