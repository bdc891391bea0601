"""The statistics of the soak: what grows is found, what is only noisy is not, and the interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.soak.trend import FLAT, GROWING, UNCLEAR, Trend, fit_trend

SAMPLES = 300
HOURS = np.linspace(0, 0.25, SAMPLES)


def autocorrelated(seed: int, scale: float, memory: float = 0.8) -> np.ndarray:
    """Noise of which each sample keeps a part of the sample before it; ``scale`` is its standard deviation."""
    fresh = np.random.default_rng(seed).normal(0, scale * (1 - memory**2) ** 0.5, SAMPLES)
    noise = np.zeros(SAMPLES)
    for index in range(1, SAMPLES):
        noise[index] = memory * noise[index - 1] + fresh[index]
    return noise


def test_the_slope_of_a_line_is_exact_and_outliers_do_not_change_it():
    values = 3 + 7 * HOURS
    values[::20] += 1000
    trend = fit_trend(HOURS, values)
    assert (trend.slope, trend.lower, trend.upper) == pytest.approx((7, 7, 7), abs=0.2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("leak", "verdict"), [(40, GROWING), (0, FLAT)])
def test_a_leaking_series_is_growing_and_a_noisy_one_is_flat(leak, verdict, seed):
    assert fit_trend(HOURS, 500 + leak * HOURS + autocorrelated(seed, 0.5)).verdict(16) == verdict


def test_a_series_with_more_noise_than_the_run_can_tell_is_neither():
    assert fit_trend(HOURS, 500 + 16 * HOURS + autocorrelated(0, 10)).verdict(16) == UNCLEAR


def test_a_small_leak_of_whole_numbers_is_growing_and_a_constant_is_flat():
    """Ten descriptors in a quarter of an hour, one at a time, among some that come and go."""
    open_files = 100 + np.floor(40 * HOURS) + np.random.default_rng(0).integers(0, 3, SAMPLES)
    assert fit_trend(HOURS, open_files).verdict(20) == GROWING
    assert fit_trend(HOURS, [100] * SAMPLES) == Trend(0, 0, 0)


@pytest.mark.parametrize("step", [30, 100, 150, 250])
def test_one_step_in_a_constant_series_is_not_growing(step):
    """An allocator that takes more memory once. The run can't tell this from a leak that shows once in a while."""
    trend = fit_trend(HOURS, np.where(np.arange(SAMPLES) < step, 100, 110))
    assert trend.lower == 0
    assert trend.verdict(16) != GROWING


@pytest.mark.parametrize(("memory", "least"), [(0.0, 0.9), (0.8, 0.9), (0.95, 0.85)])
def test_the_interval_holds_the_slope_in_most_runs(memory, least):
    trends = [fit_trend(HOURS, 5 * HOURS + autocorrelated(seed, 1, memory)) for seed in range(100)]
    assert sum(trend.lower <= 5 <= trend.upper for trend in trends) / len(trends) >= least
