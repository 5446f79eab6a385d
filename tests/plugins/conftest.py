"""What tests of kernels share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def interpreter():
    """Older interpreters cannot count up to a number that a program loads, with a newer numpy."""
    import torch
    from device_cases import DEVICE
    from mdgraft.kernels.device.programs import program, start

    text = "@triton.jit\ndef count(x):\n    for k in range(tl.load(x)):\n        tl.store(x, k)\n"
    try:
        start(program("count", text), (1,), torch.tensor([2], device=DEVICE), warps=1)
    except Exception as error:
        if "0-dim" in str(error):
            pytest.skip("the interpreter of this triton does not work with this numpy")
        raise
