from __future__ import annotations

import numpy as np
import pytest

from moevlm.data.lengths import UNUSABLE
from moevlm.data.packing import PackedPlan, best_fit, fill_rows
from moevlm.data.plan import MixturePlan
from tests.reference.packing import best_fit_rows


def conversation_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Like visual instructions: an image of 576 tokens, or none, and text of a long-tailed length; at most 2048."""
    draws = np.random.default_rng(seed)
    text = np.minimum(draws.lognormal(5, 0.8, count).astype(np.int64) + 20, 1400)
    return text + 576 * (draws.random(count) < 0.9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [40, 64, 200])
def test_rows_are_those_of_the_slow_reference(seed: int, budget: int) -> None:
    lengths = np.random.default_rng(seed).integers(0, 40, 300).tolist()
    rows = best_fit(lengths, budget)
    assert sorted(item for row in rows for item in row) == list(range(300))
    assert sorted(sum(lengths[item] for item in row) for row in rows) == best_fit_rows(lengths, budget)


@pytest.mark.parametrize("budget", [40, 64, 200])
def test_filled_rows_hold_every_item_once_and_none_that_would_fit_is_left_out(budget: int) -> None:
    lengths = np.random.default_rng(1).integers(0, 40, 300).tolist()
    rows = fill_rows(lengths, budget)
    assert sorted(item for row in rows for item in row) == list(range(300))
    rooms = [budget - sum(lengths[item] for item in row) for row in rows]
    assert min(rooms) >= 0
    for number, room in enumerate(rooms):
        assert all(lengths[item] > room for row in rows[number + 1 :] for item in row)


def plan_of(*sizes: int, budget: int = 4096, window: int = 512, **options: object) -> PackedPlan:
    lengths = [conversation_lengths(size, seed) for seed, size in enumerate(sizes)]
    return PackedPlan(MixturePlan([[size] for size in sizes], seed=3), lengths, budget=budget, window=window)


def test_every_position_stands_in_one_row_and_no_row_is_too_long() -> None:
    plan = plan_of(700, 300)
    rows, taken = [], []
    while len(taken) < 4 * 512:
        rows.append(plan.row(len(rows)))
        taken += rows[-1]
    assert sorted(taken) == list(range(4 * 512))
    assert max(sum(plan._length(position) for position in row) for row in rows) <= 4096


def test_rows_are_found_from_anywhere_without_packing_what_stands_before() -> None:
    walking, jumped = plan_of(700, 300), plan_of(700, 300)
    walked = [walking.row(number) for number in range(300)]
    assert [plan_of(700, 300).row(number) for number in (7, 150, 299)] == [walked[7], walked[150], walked[299]]
    window, before = plan_of(700, 300).window_of(250)
    assert window > 1
    jumped.start_at(window, before)
    assert [jumped.row(number) for number in range(before, 300)] == walked[before:]
    assert jumped.row(3) == walked[3]  # and back


def test_rows_of_different_length_are_mixed() -> None:
    plan = plan_of(4096, window=4096)
    counts = [len(plan.row(number)) for number in range(400)]
    assert abs(np.mean(counts[:200]) - np.mean(counts[200:])) < 0.5


@pytest.mark.parametrize("budget", [4096, 8192])
def test_at_most_three_percent_is_wasted_on_visual_instructions(budget: int) -> None:
    plan = PackedPlan(MixturePlan([[50_000]], seed=1), [conversation_lengths(50_000)], budget=budget)
    assert max(plan.waste(window) for window in range(3)) <= 0.03


def test_unusable_samples_keep_a_place_where_they_are_read_and_named() -> None:
    lengths = np.array([5, UNUSABLE, 7, 3])
    plan = PackedPlan(MixturePlan([[4]], seed=0), [lengths], budget=8, window=4)
    rows = [plan.row(number) for number in range(2)]
    assert sorted(position for row in rows for position in row) == [0, 1, 2, 3]


def test_a_budget_below_the_longest_sample_names_its_key() -> None:
    with pytest.raises(ValueError, match=r"pack_tokens=100 is less than the longest sample, .*set data.pack_tokens"):
        plan_of(50, budget=100)
