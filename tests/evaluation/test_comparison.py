import numpy as np
import pytest

from moevlm.evaluation.comparison import pair_by_id, paired_bootstrap


def test_a_clear_difference_excludes_zero_and_none_does_not() -> None:
    generator = np.random.default_rng(0)
    better, worse = generator.random(400) < 0.8, generator.random(400) < 0.6
    result = paired_bootstrap(better, worse, num_resamples=1000, seed=0)
    assert result.excludes_zero
    assert result.low < result.difference < result.high
    assert result.difference == pytest.approx(better.mean() - worse.mean())
    same = paired_bootstrap(better, better, num_resamples=100, seed=0)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        a, b = generator.random(200) < 0.7, generator.random(200) < 0.6
        result = paired_bootstrap(a, b, num_resamples=300, seed=trial)
        covered += result.low <= 0.1 <= result.high
    assert 180 <= covered <= 200


def test_pairing_makes_the_interval_narrower_than_the_questions_are_different() -> None:
    hard = np.arange(300) % 2
    result = paired_bootstrap(hard, np.where(np.arange(300) < 6, 0, hard), num_resamples=500, seed=0)
    assert result.difference == pytest.approx(0.01)
    assert result.high - result.low < 0.03  # unpaired, it would be 0.16


def test_the_seed_decides_and_only_the_seed() -> None:
    a, b = [1, 0, 1, 1, 0], [0, 0, 1, 0, 1]
    assert paired_bootstrap(a, b, num_resamples=50, seed=3) == paired_bootstrap(a, b, num_resamples=50, seed=3)


def test_pairs_are_made_by_id_and_a_missing_answer_is_refused() -> None:
    assert pair_by_id({"x": 1, "y": 0}, {"y": 1, "x": 0}) == ([1, 0], [0, 1])
    with pytest.raises(ValueError, match="different questions"):
        pair_by_id({"x": 1}, {"x": 1, "y": 0})
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired_bootstrap([1], [1, 0])
