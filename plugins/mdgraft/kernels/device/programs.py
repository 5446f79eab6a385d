"""Triton programs from text, and how they are started."""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

_HEAD = "import triton\nimport triton.language as tl\n\n"


def interpreted() -> bool:
    """Whether Triton interprets programs on CPUs, for tests; see its own documentation."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=512)
def program(name: str, text: str) -> Any:
    """The function of this name in a text, compiled when it is first started."""
    source = _HEAD + text
    # Triton reads the source of its functions again, from a file or from here.
    place = f"<mdgraft {name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[place] = (len(source), None, source.splitlines(True), place)
    scope: dict[str, Any] = {"__name__": "mdgraft.kernels.device.generated"}
    exec(compile(source, place, "exec"), scope)
    return scope[name]


def start(function: Any, grid: tuple[int, ...], *arguments: Tensor | int, warps: int) -> None:
    """Start a program on each point of a grid, if there is any."""
    if not math.prod(grid):
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    # Programs start on the current device, which need not be that of the tensors; interpreted ones
    # warn of what is not a number, even where a selection then leaves it out.
    place = torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore")
    with place:
        function[grid](*arguments, num_warps=warps, enable_fp_fusion=True)
