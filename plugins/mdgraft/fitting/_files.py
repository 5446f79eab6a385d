"""Files that are either complete or absent, whenever the process dies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary neighbour of ``path``, then rename it into place."""
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a text file."""

    def write(temporary: Path) -> None:
        # Line ends are part of what must not depend on the platform.
        with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)

    write_atomically(path, write)


def move_aside(folder: Path) -> Path:
    """Rename a folder to the first free ``name.1``, ``name.2``, ..."""
    folder = folder.resolve()
    number = 1
    while (backup := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(backup)
    return backup


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Some systems cannot open folders.
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
