"""Growth of a series of samples, with an interval that allows for the autocorrelation of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

BATCHES = 12
FLAT, GROWING, UNCLEAR = "flat", "growing", "unclear"


@dataclass(frozen=True)
class Trend:
    """A slope in units of the series per unit of time, and its 95 % interval."""

    slope: float
    lower: float
    upper: float

    def verdict(self, bound: float) -> str:
        """Return FLAT, GROWING or UNCLEAR.

        FLAT: the interval lies below ``bound``; GROWING: it lies above; UNCLEAR: the run was too short.
        """
        if self.upper <= bound:
            return FLAT
        return GROWING if self.lower > bound else UNCLEAR


def batch_medians(values: ArrayLike, batches: int) -> NDArray[np.float64]:
    """Return the median of each of ``batches`` runs of consecutive values, as equally long as possible."""
    return np.array([np.median(batch) for batch in np.array_split(np.asarray(values, float), batches)])


def fit_trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    """Return the Theil-Sen slope over the medians of 12 batches, with Sen's interval (Sen 1968).

    Neighbouring samples are not independent: an allocator keeps what it once took, and a burst lasts for several
    samples. Sen's interval assumes independent points of any distribution. The medians of batches are nearly
    independent if what connects samples lasts for less than a twelfth of the run. One step in a constant series, as of
    an allocator that takes more memory once, gives an interval that begins at 0.

    Args:
        times: increasing times.
        values: one value for each of ``times``.

    Raises:
        ValueError: there are fewer samples than batches.
    """
    if len(times) < BATCHES:
        raise ValueError(f"a trend of {len(times)} samples is refused: at least {BATCHES} are needed")
    x, y = batch_medians(times, BATCHES), batch_medians(values, BATCHES)
    first, second = np.triu_indices(BATCHES, 1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    # Kendall's S, the number of rising pairs less that of falling ones, has this variance if there is no trend.
    spread = NormalDist().inv_cdf(0.975) * (BATCHES * (BATCHES - 1) * (2 * BATCHES + 5) / 18) ** 0.5
    rank = int((len(slopes) - spread) / 2)
    return Trend(float(np.median(slopes)), float(slopes[rank]), float(slopes[-1 - rank]))
