"""Estimators side by side: table, picture, z-scores."""

from __future__ import annotations

import math

import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft.montecarlo import Displacement
from mdgraft.montecarlo.comparison import compare
from mdgraft.montecarlo.gradients import Coupled, Covariance, Score
from montecarlo_problems import gaussian


@pytest.fixture(scope="module")
def comparison():
    case = gaussian(Displacement(1.3))
    before = case.sampler.state
    found = compare(
        case.sampler,
        case.observable,
        {"fixed samples": Covariance(), "branches": Coupled(warm_up=60)},
        {"fixed samples": 100, "branches": 80},
        reference=case.gradient,
        seed=3,
    )
    # The sampler that was handed in has not moved.
    assert torch.equal(case.sampler.state.positions, before.positions)
    assert case.sampler.state.step == before.step
    return found


def test_scores(comparison):
    entries = list(comparison.entries())
    assert [label for label, _, _ in entries] == ["well.center [0]", "well.center [1]"]
    assert comparison.results["branches"].estimate.n_frames == 80 * 64
    for _, name, index in entries:
        scores = comparison.z_scores(name, index)
        assert scores.shape == (2, 2)
        assert torch.allclose(scores, -scores.T)
        (a, s), (b, t) = (comparison.value(e, name, index) for e in comparison.results)
        assert float(scores[0, 1]) == pytest.approx((a - b) / math.hypot(s, t))
        for estimator in comparison.results:
            assert abs(comparison.reference_z(estimator, name, index)) < 4.5
            assert comparison.cost(estimator, name, index) > 0
    assert comparison.largest_z() < 4.5
    assert math.isnan(comparison.reference_z("branches", "other"))


def test_table_and_picture(comparison, tmp_path):
    text = str(comparison)
    for word in ("well.center [0]", "fixed samples", "branches", "z to reference", "consistent"):
        assert word in text
    figure = comparison.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    first = figure.axes[0]
    assert [t.get_text() for t in first.get_yticklabels()] == ["fixed samples", "branches"]
    assert first.get_legend() is not None


def test_names_of_classes_and_no_reference():
    case = gaussian(Displacement(1.3), n_chains=4)
    found = compare(case.sampler, lambda s: s.positions[:, 0, 0], [Covariance(), Score()], 10)
    assert list(found.results) == ["Covariance", "Score"]
    assert "z to reference" not in str(found)
    assert found.plot() is not None


def test_refusals():
    case = gaussian(Displacement(1.3), n_chains=2)
    with pytest.raises(InvalidInputError, match="dictionary of names"):
        compare(case.sampler, case.observable, [Score(), Score(window=3)], 10)
    with pytest.raises(InvalidInputError, match="got none"):
        compare(case.sampler, case.observable, [], 10)
    with pytest.raises(InvalidInputError, match="reference"):
        compare(case.sampler, case.observable, [Covariance()], 10, reference={"other": 1.0})
