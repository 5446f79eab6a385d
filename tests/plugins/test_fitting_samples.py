"""Frames of a fit on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mdgraft import ConfigurationError, Frames
from mdgraft.fitting.samples import _load_block, _save_block


def test_a_block_keeps_the_last_velocities(tmp_path: Path) -> None:
    x = torch.arange(18, dtype=torch.float64).reshape(3, 2, 3)
    _save_block(tmp_path / "block.npz", Frames(positions=x, velocities=-x, sampled="NVT"))
    frames, last = _load_block(tmp_path / "block.npz")
    assert torch.equal(frames.positions, x)
    assert frames.sampled == "NVT"
    assert last.velocities is not None
    assert torch.equal(last.velocities, -x[2:])


@pytest.mark.parametrize("damage", ["torn", "text", "empty", "foreign", "array"])
def test_damaged_blocks_are_an_error(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "block.npz"
    _save_block(path, Frames(positions=torch.zeros(2, 1, 3, dtype=torch.float64)))
    content = {"torn": path.read_bytes()[:-50], "text": b"nothing", "empty": b""}
    if damage in content:
        path.write_bytes(content[damage])
    else:
        with open(path, "wb") as stream:
            if damage == "array":
                np.save(stream, np.zeros(3))
            else:
                np.savez(stream, other=np.zeros(3))
    with pytest.raises(ConfigurationError, match=r"block\.npz: is damaged .*without --resume"):
        _load_block(path)
