"""Fixtures of tests of exports."""

import pytest
from exported import CALLBACKS, needs_callbacks


@pytest.fixture(params=CALLBACKS)
def each_callback(request, monkeypatch):
    """Every test with each class that calls Python, as ``PYTHON`` of its module."""
    needs_callbacks(CALLBACKS[request.param])
    monkeypatch.setattr(request.module, "PYTHON", CALLBACKS[request.param])
