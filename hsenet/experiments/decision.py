# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Whether a claim held: an interval over seeds, paired by seed, and one rule for all experiments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """
    Student's t interval of the mean: what other seeds would have given.

    Raises:
        ValueError: fewer than two values say nothing of how seeds differ.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"An interval over seeds takes at least two of them, got {len(values)}.")
    mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error
    return Interval(float(mean), float(mean - half), float(mean + half))


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """The t interval of `first - second`, value i of both from the same seed."""
    if len(first) != len(second):
        raise ValueError(f"Expected the same seeds on both sides, got {len(first)} and {len(second)}.")
    return t_interval(np.subtract(first, second), confidence)


def verdict(difference: Interval, better: Literal["higher", "lower"] = "higher") -> str:
    """ "yes" if the whole interval of the difference favours the first, "no" if the second, else "undecided"."""
    low, high = (difference.low, difference.high) if better == "higher" else (-difference.high, -difference.low)
    if low > 0:
        return "yes"
    return "no" if high < 0 else "undecided"


def weighted_bootstrap(num_clusters: int, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each patient is drawn in each resample: `(num_resamples, num_clusters)`."""
    return np.random.default_rng(seed).multinomial(
        num_clusters, np.full(num_clusters, 1 / num_clusters), num_resamples
    )


def percentile_interval(value: float, resampled: np.ndarray) -> Interval:
    """A value with the middle 95 % of its resamples."""
    low, high = np.nanpercentile(resampled, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))
