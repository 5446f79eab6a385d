"""The record that every estimated gradient comes in."""

from __future__ import annotations

import dataclasses

import mdgraft
import pytest
import torch
from mdgraft import Estimate, InvalidInputError

ONE = torch.tensor([1.0, 2.0], dtype=torch.float64)


def make(**changes):
    fields = {
        "value": torch.tensor([3.14159, -2.0], dtype=torch.float64),
        "standard_error": torch.tensor([0.0123, 0.5], dtype=torch.float64),
        "gradient": {"bonds.k": torch.ones(2, 3, dtype=torch.float64)},
        "gradient_standard_error": {"bonds.k": torch.full((2, 3), 0.25, dtype=torch.float64)},
        "n_frames": 100,
        "effective_sample_size": 80.0,
        "entropy_sample_size": 90.0,
        "max_weight": 0.03,
        "pareto_k": 0.2,
        "statistical_inefficiency": torch.tensor([1.5, 2.0], dtype=torch.float64),
        "method": "reweighting",
        "bias": "consistent",
    }
    return Estimate(**{**fields, **changes})


def test_it_is_frozen_and_keyword_only():
    estimate = make()
    with pytest.raises(dataclasses.FrozenInstanceError, match="value"):
        estimate.value = ONE
    with pytest.raises(TypeError, match="positional"):
        Estimate(ONE, ONE)


def test_summary_shows_values_errors_and_method():
    text = str(make())
    for part in ("3.142 +- 0.012", "bonds.k", "1.00 +- 0.25", "100 frames", "80", "reweighting"):
        assert part in text
    assert "consistent" in text
    assert "Pareto k -" in str(make(pareto_k=None))


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (1234.6, 25.0, "1235 +- 25"),
        (0.5, 0.0, "0.5 +- 0"),
        (1.0, float("inf"), "1 +- inf"),
        (1.5e-9, 2.5e-10, "1.5e-09 +- 2.5e-10"),
    ],
)
def test_summary_of_one_number(value, error, shown):
    one = {
        "value": torch.tensor(value, dtype=torch.float64),
        "standard_error": torch.tensor(error, dtype=torch.float64),
        "gradient": {},
        "gradient_standard_error": {},
        "statistical_inefficiency": torch.tensor(1.0),
    }
    assert shown in make(**one).summary()


def test_long_tensors_are_cut_in_the_summary():
    text = make(
        value=torch.zeros(9),
        standard_error=torch.ones(9),
        statistical_inefficiency=torch.ones(9),
        gradient={},
        gradient_standard_error={},
    ).summary()
    assert "... (9 entries)" in text


def test_confidence_interval():
    lower, upper = make().confidence_interval(z=2.0)
    assert torch.allclose(upper - lower, 4.0 * make().standard_error)
    assert torch.allclose(upper + lower, 2.0 * make().value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "none"}, "bias: got 'none'"),
        ({"standard_error": torch.ones(3)}, "standard_error: got shape"),
        ({"gradient_standard_error": {}}, "gradient_standard_error: names"),
        ({"gradient_standard_error": {"bonds.k": ONE}}, "wanted that of the gradient"),
        (
            {
                "gradient": {"bonds.k": torch.ones(3)},
                "gradient_standard_error": {"bonds.k": torch.ones(3)},
            },
            "starts with that of the value",
        ),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        make(**changes)


def test_it_is_exported():
    assert mdgraft.Estimate is Estimate
