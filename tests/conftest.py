"""What all tests share: which of them can run on this machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from typing import Any

import pytest
import torch

_REQUIRED = os.environ.get("MDGRAFT_REQUIRE_OPENMMTORCH") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("openmmtorch") and not importlib.util.find_spec("openmmtorch"):
        pytest.skip('openmm-torch is not installed; pip install -e ".[test,openmmtorch]"')
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """Where openmm-torch must work, a test of it that skips has failed."""
    report = yield
    if _REQUIRED and report.skipped and item.get_closest_marker("openmmtorch"):
        report.outcome = "failed"
        report.longrepr = f"MDGRAFT_REQUIRE_OPENMMTORCH is set, but: {report.longrepr}"
    return report
