import random

import pytest

from moevlm.evaluation.vqa import score_vqa

ROWS = [
    {"kind": "count", "gold": "2", "answer": "two", "phrasing": "train"},
    {"kind": "count", "gold": "3", "answer": "2", "phrasing": "heldout"},
    {"kind": "count", "gold": "1", "answer": "1.", "phrasing": "train"},
    {"kind": "count", "gold": "4", "answer": "", "phrasing": "train"},
    {"kind": "existence", "gold": "Yes", "answer": "yes", "phrasing": "train"},
    {"kind": "existence", "gold": "no", "answer": "No.", "phrasing": "heldout"},
    {"kind": "arithmetic", "gold": "7", "answer": "8", "phrasing": "train", "text_only": True},
]


def test_accuracy_is_the_mean_over_visual_kinds_whatever_their_size() -> None:
    scores = score_vqa(ROWS)
    assert scores["accuracy_kind_count"] == 0.5
    assert scores["accuracy_kind_existence"] == 1.0
    assert scores["accuracy_kind_arithmetic"] == 0.0
    assert scores["accuracy"] == 0.75
    assert scores["accuracy_micro"] == pytest.approx(4 / 6)
    assert scores["num_rows"] == 6
    assert scores["num_kind_arithmetic"] == 1


def test_open_and_closed_questions_and_phrasings_are_told_apart() -> None:
    scores = score_vqa(ROWS)
    assert (scores["accuracy_open"], scores["num_open"]) == (0.5, 4)
    assert (scores["accuracy_closed"], scores["num_closed"]) == (1.0, 2)
    assert (scores["accuracy_phrasing_heldout"], scores["num_phrasing_heldout"]) == (0.5, 2)
    assert score_vqa([ROWS[0] | {"open": False}])["num_closed"] == 1


def test_the_order_of_rows_does_not_matter() -> None:
    shuffled = ROWS.copy()
    random.Random(0).shuffle(shuffled)
    assert score_vqa(shuffled) == score_vqa(ROWS)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        score_vqa([])
