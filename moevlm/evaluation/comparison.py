"""Is one model better than another on the same questions?"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class PairedDifference(NamedTuple):
    """Mean of a - b over the same questions, with its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float
    num_rows: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    correct_a: Sequence[float], correct_b: Sequence[float], *, num_resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Percentile bootstrap over questions of ``mean(a - b)``; the two stay paired in every resample.

    Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13. Deterministic by seed.

    Args:
        correct_a: score of model a on each question, 0 or 1 or any number.
        correct_b: score of model b on the same questions in the same order.
        num_resamples: samples drawn with replacement.
        seed: of the resampling.

    Raises:
        ValueError: the two differ in length, are empty, or `num_resamples` is less than 1.
    """
    if len(correct_a) != len(correct_b):
        raise ValueError(f"paired scores must be as many: got {len(correct_a)} and {len(correct_b)}")
    if not len(correct_a) or num_resamples < 1:
        raise ValueError(f"need rows and num_resamples >= 1, got {len(correct_a)} rows and {num_resamples} resamples")
    differences = np.asarray(correct_a, dtype=np.float64) - np.asarray(correct_b, dtype=np.float64)
    generator, num_rows = np.random.default_rng(seed), len(differences)
    means = np.empty(num_resamples)
    for index in range(num_resamples):  # one resample at a time: memory stays at one row of indices
        means[index] = differences[generator.integers(num_rows, size=num_rows)].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    return PairedDifference(float(differences.mean()), float(low), float(high), num_rows)


def pair_by_id(scores_a: Mapping[Any, float], scores_b: Mapping[Any, float]) -> tuple[list[float], list[float]]:
    """Two models' scores by row id, brought into one order.

    Raises:
        ValueError: the ids differ; a comparison over the common part would hide missing answers.
    """
    if scores_a.keys() != scores_b.keys():
        missing = sorted(map(str, scores_a.keys() ^ scores_b.keys()))
        raise ValueError(f"the two answer different questions: {len(missing)} ids in one only, e.g. {missing[:3]}")
    return [float(scores_a[key]) for key in scores_a], [float(scores_b[key]) for key in scores_a]
