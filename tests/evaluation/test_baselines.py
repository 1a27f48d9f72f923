from moevlm.evaluation.baselines import (
    above_chance,
    constant_rows,
    majority_answers,
    same_answer_rows,
    swapped_rows,
)
from moevlm.evaluation.vqa import score_vqa

ROWS = [
    {"id": 0, "kind": "count", "gold": "2", "answer": "9"},
    {"id": 1, "kind": "count", "gold": "Two", "answer": "9"},
    {"id": 2, "kind": "count", "gold": "3", "answer": "9"},
    {"id": 3, "kind": "colour", "gold": "red", "answer": "9"},
    {"id": 4, "kind": "colour", "gold": "blue", "answer": "9"},
]


def test_the_majority_answer_is_counted_after_normalisation_and_ties_go_by_the_alphabet() -> None:
    assert majority_answers(ROWS) == {"colour": "blue", "count": "2"}


def test_the_constant_baseline_scores_the_share_of_its_answer() -> None:
    scores = score_vqa(constant_rows(ROWS, majority_answers(ROWS)))
    assert scores["accuracy_kind_count"] == 2 / 3
    assert scores["accuracy_kind_colour"] == 1 / 2
    assert constant_rows(ROWS, {})[0]["answer"] == ""
    assert ROWS[0]["answer"] == "9"


def test_swapped_rows_give_every_row_the_answer_of_another() -> None:
    rows = [{"gold": str(index), "mentioned": [], "gold_mentioned": [index]} for index in range(7)]
    swapped = swapped_rows(rows, seed=1)
    assert all(row["answer"] != row["gold"] for row in swapped)
    assert sorted(row["answer"] for row in swapped) == sorted(row["gold"] for row in rows)
    assert all(row["mentioned"] == [int(row["answer"])] for row in swapped)
    assert swapped == swapped_rows(rows, seed=1)


def test_the_table_shows_the_distance_from_chance() -> None:
    assert {row["answer"] for row in same_answer_rows(ROWS, "yes")} == {"yes"}
    table = above_chance({"vqa": {"accuracy": 0.7}}, {"vqa": {"accuracy": 0.2}}, {"vqa": "accuracy", "pope": "f1"})
    assert [(row["benchmark"], round(row["difference"], 6)) for row in table] == [("vqa", 0.5)]
