import random

import pytest

from moevlm.evaluation.pope import is_correct, parse_llava, parse_yes_no, score_pope


@pytest.mark.parametrize(
    ("text", "llava", "strict"),
    [
        ("Yes", True, True),
        ("No", False, False),
        ("No.", False, False),
        ("no, there is none", False, False),
        ("Yes, there is no dog", False, True),
        ("**Yes**", True, True),
        ("NO", True, False),
        ("no!", True, False),
        ("Nope", True, None),
        ("", True, None),
        ("not sure", False, None),
        ("I do not know", False, None),
        ("There isn't", True, None),
        ("Yes,no", True, True),
        ("A red star. no", True, None),
    ],
)
def test_answers_are_read_as_yes_or_no(text: str, llava: bool, strict: bool | None) -> None:
    assert parse_llava(text) is llava
    assert parse_yes_no(text) is strict


def rows(split: str, true_yes: int, false_yes: int, true_no: int, false_no: int) -> list[dict[str, str]]:
    cells = [("yes", "Yes", true_yes), ("no", "Yes", false_yes), ("no", "No", true_no), ("yes", "No", false_no)]
    return [{"split": split, "gold": gold, "answer": said} for gold, said, count in cells for _ in range(count)]


def test_metrics_of_a_confusion_table_by_hand() -> None:
    scores = score_pope(rows("random", 6, 2, 3, 1))
    assert scores["accuracy"] == 9 / 12
    assert scores["precision"] == 6 / 8
    assert scores["recall"] == 6 / 7
    assert scores["f1"] == pytest.approx(12 / 15)
    assert scores["yes_ratio"] == 8 / 12
    assert scores["unparsable_fraction"] == 0
    assert scores["f1_random"] == scores["f1"]


def test_the_headline_is_the_mean_over_splits() -> None:
    scores = score_pope(rows("random", 5, 0, 5, 0) + rows("adversarial", 5, 5, 0, 0))
    assert scores["f1_random"] == 1
    assert scores["f1_adversarial"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(5 / 6)
    assert scores["num_rows"] == 20


def test_an_unparsable_answer_is_a_yes_for_llava_and_wrong_when_strict() -> None:
    garbage = [{"split": "random", "gold": gold, "answer": "star"} for gold in ("yes", "no")]
    assert score_pope(garbage)["accuracy"] == 0.5
    strict = score_pope(garbage, protocol="strict")
    assert strict["accuracy"] == 0
    assert strict["yes_ratio"] == 0
    assert strict["unparsable_fraction"] == 1
    assert not any(is_correct(row, protocol="strict") for row in garbage)


def test_never_yes_scores_zero_and_does_not_divide_by_it() -> None:
    scores = score_pope(rows("random", 0, 0, 4, 4))
    assert (scores["precision"], scores["recall"], scores["f1"]) == (0, 0, 0)


def test_the_order_of_rows_does_not_matter() -> None:
    straight = rows("random", 6, 2, 3, 1) + rows("popular", 1, 2, 3, 4)
    shuffled = straight.copy()
    random.Random(0).shuffle(shuffled)
    assert score_pope(shuffled) == score_pope(straight)


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="llava, strict"):
        score_pope(rows("random", 1, 0, 0, 0), protocol="loose")
    with pytest.raises(ValueError, match="'maybe'"):
        score_pope([{"split": "random", "gold": "maybe", "answer": "yes"}])
    with pytest.raises(ValueError, match="no rows"):
        score_pope([])
