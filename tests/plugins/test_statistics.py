"""Statistics of correlated series against closed forms and pymbar."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft.ensembles import (
    autocovariance,
    decorrelate,
    detect_equilibration,
    entropy_sample_size,
    kish_sample_size,
    moving_block_bootstrap,
    pareto_k,
    standard_error,
    statistical_inefficiency,
)
from mdgraft.testsystems._chains import autoregressive
from pymbar import timeseries


def chain(n_frames, correlation, n_series, seed):
    generator = torch.Generator().manual_seed(seed)
    return autoregressive(n_frames, (n_series,), correlation=correlation, generator=generator)


def test_autocovariance_is_the_plain_sum():
    x = chain(37, 0.7, 3, seed=0)
    centred = x - x.mean(dim=0)
    direct = torch.stack([(centred[: 37 - k] * centred[k:]).sum(dim=0) / 37 for k in range(37)])
    assert torch.allclose(autocovariance(x), direct, rtol=0, atol=1e-13)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 0.95])
def test_inefficiency_of_autoregressive_chains(correlation):
    g = statistical_inefficiency(chain(20000, correlation, 60, seed=1))
    exact = (1 + correlation) / (1 - correlation)
    # Relative standard error of one estimate is about sqrt(2 W / N) with W of some 6 g lags.
    tolerance = 4 * math.sqrt(12 * exact / 20000 / 60) + 6 * exact / 20000 + 0.02
    assert abs(float(g.mean()) / exact - 1) < tolerance


@pytest.mark.parametrize("correlation", [0.3, 0.8, 0.95])
def test_inefficiency_agrees_with_pymbar(correlation):
    x = chain(4000, correlation, 20, seed=2)
    theirs = np.array([timeseries.statistical_inefficiency(s) for s in x.T.numpy()])
    ours = statistical_inefficiency(x).numpy()
    # Two window rules on the same data: they differ by noise in the tail alone.
    assert np.median(np.abs(ours / theirs - 1)) < 0.1
    assert abs(ours.mean() / theirs.mean() - 1) < 0.1


def test_inefficiency_keeps_shapes_and_bounds():
    x = chain(500, -0.8, 6, seed=3).reshape(500, 2, 3)
    g = statistical_inefficiency(x)
    assert g.shape == (2, 3)
    assert bool((g >= 1).all())
    assert statistical_inefficiency(torch.full((50,), 0.1)).item() == 1.0
    assert statistical_inefficiency(torch.tensor([1.0, 2.0])).item() == 1.0


def test_many_series_equal_one_at_a_time(monkeypatch):
    x = chain(300, 0.8, 7, seed=4)
    together = statistical_inefficiency(x)
    monkeypatch.setattr("mdgraft.ensembles.statistics._CHUNK", 600)
    assert torch.equal(statistical_inefficiency(x), together)
    alone = torch.stack([statistical_inefficiency(s) for s in x.T])
    assert torch.allclose(alone, together, rtol=1e-12)


# Coverage -----------------------------------------------------------------------------------------

REPLICAS = 1000


def influence_gradient(o, g):
    """-Cov(o, g) and its standard error, for beta = 1."""
    product = -(o - o.mean(dim=0)) * (g - g.mean(dim=0))
    value = product.mean(dim=0)
    return value, standard_error(product - value)


def coverage(estimate, truth):
    value, error = estimate
    return float(((value - truth).abs() < 1.96 * error).double().mean())


@pytest.mark.parametrize(
    ("n_frames", "correlation"),
    [(300, 0.0), (500, 0.0), (500, 0.5), (500, 0.9), (1000, 0.95), (2000, 0.95), (4000, 0.98)],
)
def test_intervals_cover_the_gradient(n_frames, correlation):
    """N(theta, 1 / k) at theta = 0, k = 1, where dU/dtheta = -x and dU/dk = x^2 / 2."""
    x = chain(n_frames, correlation, REPLICAS, seed=n_frames + int(100 * correlation))
    mean = x.mean(dim=0), standard_error(x - x.mean(dim=0))
    assert 0.88 <= coverage(mean, 0.0) <= 0.98
    assert 0.88 <= coverage(influence_gradient(x, -x), 1.0) <= 0.98
    assert 0.88 <= coverage(influence_gradient(x * x, 0.5 * x * x), -1.0) <= 0.98


@pytest.mark.parametrize(("n_frames", "correlation"), [(200, 0.8), (500, 0.9), (2000, 0.98)])
def test_intervals_cover_when_other_coordinates_add_noise(n_frames, correlation):
    """As above for <(x + 1/2)^2>, with k shared by three coordinates and few effective frames."""
    x = chain(n_frames, correlation, 3 * REPLICAS, seed=n_frames).reshape(n_frames, REPLICAS, 3)
    energy = 0.5 * x.square().sum(dim=-1)
    x = x[..., 0]
    assert 0.88 <= coverage(influence_gradient(x * x, energy), -1.0) <= 0.98
    assert 0.88 <= coverage(influence_gradient((x + 0.5) ** 2, energy), -1.0) <= 0.98


@pytest.mark.parametrize(("n_frames", "correlation"), [(500, 0.0), (1000, 0.8), (4000, 0.9)])
def test_intervals_cover_gradients_that_vanish(n_frames, correlation):
    x = chain(n_frames, correlation, REPLICAS, seed=n_frames)
    assert 0.88 <= coverage(influence_gradient(x * x, -x), 0.0) <= 0.98


def test_naive_errors_would_not_cover():
    x = chain(1000, 0.9, REPLICAS, seed=5)
    psi = x * x - (x * x).mean(dim=0)
    naive = psi.std(dim=0) / math.sqrt(1000)
    covered = float((((x * x).mean(dim=0) - 1).abs() < 1.96 * naive).double().mean())
    assert covered < 0.6


def test_standard_error_of_long_series_is_the_textbook_one():
    x = chain(200000, 0.5, 4, seed=6)
    exact = math.sqrt(3.0 / 200000)
    assert torch.allclose(standard_error(x), torch.tensor(exact).double(), rtol=0.05)


def test_standard_error_at_the_edges():
    assert torch.isinf(standard_error(torch.ones(1, 2))).all()
    assert torch.equal(standard_error(torch.full((100, 2), 0.3)), torch.zeros(2).double())
    assert standard_error(torch.randn(100, 2, 3)).shape == (2, 3)


# Equilibration ------------------------------------------------------------------------------------


def test_equilibration_is_found():
    x = chain(2000, 0.8, 1, seed=7)[:, 0]
    drift = 20.0 * torch.exp(-torch.arange(2000) / 60.0)
    found = detect_equilibration(x + drift)
    assert 120 <= found.start <= 520
    theirs = timeseries.detect_equilibration((x + drift).numpy(), nskip=40)
    assert abs(found.start - theirs[0]) <= 160
    assert found.n_effective == pytest.approx((2000 - found.start) / found.statistical_inefficiency)


def test_a_stationary_series_is_kept():
    assert detect_equilibration(chain(2000, 0.5, 1, seed=8)).start <= 200
    assert detect_equilibration(torch.ones(100)).start == 0
    assert detect_equilibration(torch.ones(1)).start == 0


def test_decorrelated_frames_are_independent():
    x = chain(20000, 0.9, 1, seed=9)[:, 0]
    picks = decorrelate(x)
    assert picks[0] == 0
    assert bool((picks[1:] > picks[:-1]).all())
    assert 700 < len(picks) < 1500  # g = 19
    assert float(statistical_inefficiency(x[picks])) < 1.6
    assert torch.equal(decorrelate(torch.ones(5)), torch.arange(5))


# Weights ------------------------------------------------------------------------------------------


def test_sample_sizes_of_simple_weights():
    two = torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    assert kish_sample_size(two) == pytest.approx(2.0)
    assert entropy_sample_size(two) == pytest.approx(2.0)
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert kish_sample_size(weights.log()) == pytest.approx(1 / 0.375)
    assert entropy_sample_size(weights.log() + 700) == pytest.approx(2**1.5)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9, 1.3])
def test_pareto_k_of_pareto_weights(shape):
    generator = torch.Generator().manual_seed(10)
    uniform = torch.rand(40, 20000, generator=generator, dtype=torch.float64)
    fitted = torch.tensor([pareto_k(-shape * torch.log(u)) for u in uniform], dtype=torch.float64)
    n_tail = 3 * math.sqrt(20000)
    prior = 10 / (n_tail + 10)
    expected = (1 - prior) * shape + prior * 0.5
    error = (1 + shape) / math.sqrt(n_tail * 40)
    assert abs(float(fitted.mean()) - expected) < 5 * error


def test_pareto_k_without_a_tail():
    assert pareto_k(torch.zeros(1000)) is None
    assert pareto_k(torch.randn(10, dtype=torch.float64)) is None
    generator = torch.Generator().manual_seed(11)
    bounded = torch.rand(5000, generator=generator, dtype=torch.float64).log()
    assert pareto_k(bounded) < 0.0


# Bootstrap ----------------------------------------------------------------------------------------


def test_bootstrap_error_of_a_mean_and_of_a_ratio():
    x = chain(4000, 0.8, 2, seed=12)
    x[:, 1] += 10.0
    generator = torch.Generator().manual_seed(13)
    means = moving_block_bootstrap(x, lambda s: s.mean(dim=0), n_resamples=400, generator=generator)
    assert means.shape == (400, 2)
    exact = math.sqrt(9.0 / 4000)
    assert torch.allclose(means.std(dim=0), torch.tensor(exact).double(), rtol=0.25)
    ratio = moving_block_bootstrap(
        x,
        lambda s: s[:, 0].mean() / s[:, 1].mean(),
        n_resamples=400,
        block_length=60,
        generator=generator,
    )
    assert float(ratio.std()) == pytest.approx(exact / 10.0, rel=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_resamples": 1}, "n_resamples"), ({"block_length": 11}, "block_length: got 11")],
)
def test_bootstrap_refuses(options, message):
    with pytest.raises(InvalidInputError, match=message):
        moving_block_bootstrap(torch.randn(10), torch.mean, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistical_inefficiency(torch.empty(0, 2)), "series: got"),
        (lambda: statistical_inefficiency(torch.tensor([1.0, math.nan])), "NaN"),
        (lambda: standard_error([1.0, 2.0]), "series: got list"),
        (lambda: kish_sample_size(torch.zeros(2, 2)), "log_weights: got shape"),
        (lambda: kish_sample_size(torch.tensor([math.nan, 0.0])), "log_weights: holds NaN"),
    ],
)
def test_bad_series_are_refused(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()
