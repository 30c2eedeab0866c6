"""Differences between two arms of a comparison that were run with the same seeds."""

from collections.abc import Mapping

import numpy as np
from scipy.stats import bootstrap

ENOUGH = 2  # seeds


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float, float] | None:
    """The mean of `one` − `other` over the seeds that both have, and its bootstrap 95 % interval; None for too few seeds."""
    seeds = sorted(set(one) & set(other))
    if len(seeds) < ENOUGH:
        return None
    gaps = np.array([one[seed] - other[seed] for seed in seeds])
    if np.ptp(gaps) == 0:
        return float(gaps.mean()), float(gaps.mean()), float(gaps.mean())
    interval = bootstrap((gaps,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(gaps.mean()), float(interval.low), float(interval.high)


def verdict(found: tuple[float, float, float]) -> str:
    """What the interval of a difference says."""
    return "gains" if found[1] > 0 else "loses" if found[2] < 0 else "cannot be told"
