import random

import pytest

from moevlm.evaluation.chair import score_chair

ROWS = [
    {"answer": "a star and a moon", "objects": ["star", "tree"], "mentioned": ["star", "moon"]},
    {"answer": "a ring", "objects": ["ring", "house", "tree"], "mentioned": ["ring"]},
    {"answer": "nothing here", "objects": ["cross"], "mentioned": []},
    {"answer": "moon moon", "objects": ["star"], "mentioned": ["moon"]},
]


def test_chair_by_hand() -> None:
    scores = score_chair(ROWS)
    assert scores["chair_i"] == 2 / 4  # moon, moon of star, moon, ring, moon
    assert scores["chair_s"] == 2 / 4
    assert scores["chair_s_mentioning"] == 2 / 3
    assert scores["recall"] == 2 / 7
    assert scores["mean_words"] == (5 + 2 + 2 + 2) / 4


def test_the_extractor_is_an_argument() -> None:
    def extract(text: str) -> list[str]:
        return [word for word in text.split() if word in {"star", "moon", "ring"}]

    assert score_chair(ROWS, extract)["chair_i"] == 3 / 5  # a repeated mention counts again


def test_a_faithful_description_costs_nothing() -> None:
    scores = score_chair([{"answer": "star", "objects": ["star"], "mentioned": ["star"]}])
    assert (scores["chair_i"], scores["chair_s"], scores["recall"]) == (0, 0, 1)


def test_the_order_of_rows_does_not_matter() -> None:
    shuffled = ROWS.copy()
    random.Random(1).shuffle(shuffled)
    assert score_chair(shuffled) == score_chair(ROWS)


def test_rows_without_mentions_need_an_extractor() -> None:
    with pytest.raises(ValueError, match="no extractor"):
        score_chair([{"id": "x", "answer": "star", "objects": ["star"]}])
    with pytest.raises(ValueError, match="no rows"):
        score_chair([])
