"""The page over seeds, from hand-made run folders."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from experiments.run_folder import write_json
from experiments.seed_table import spread, write_table
from moevlm.evaluation.answers import compare_answers, compare_answers_of_seeds, write_answers


def answer_file(path: Path, right: list[int]) -> Path:
    rows = [{"id": number, "scorer": "vqa", "kind": "colour", "gold": "red"} for number in range(len(right))]
    return write_answers(path, [{**row, "answer": "red" if is_right else "blue"} for row, is_right in zip(rows, right)])


def seed_folder(root: Path, seed: int, right: dict[str, list[int]], **changes: Any) -> Path:
    folder = root / f"seed_{seed}"
    scores = {}
    for name, answers in right.items():
        answer_file(folder / "eval" / name / "answers/vqa.jsonl", answers)
        scores[name] = {"vqa": {"accuracy": sum(answers) / len(answers)}}
    stage = {"steps": 1350, "peak_memory_gib": 1.5, "loss_first": 2.0}
    stages = [{**stage, "name": name, "seconds": 10.0 + seed, "loss_last": 0.5 + 0.1 * seed} for name in right]
    compared = compare_answers(*(folder / "eval" / name / "answers/vqa.jsonl" for name in ("kd", "sft")))
    summary = {
        "stages": stages,
        "programs": {"cache": {"program": "cache_teacher", "seconds": 40.0 - 10 * seed}},
        "eval": scores,
        "comparisons": {"kd - sft": compared._asdict()},
        "forgetting": {"kd": {"captions": {"before": 1.0, "after": 1.2 + 0.2 * seed, "change": 0.2 + 0.2 * seed}}},
        **changes,
    }
    write_json(folder / "summary.json", summary)
    for name in right:
        (folder / name).mkdir()
        rows = [{"step": 0, "train/kd_weight": 1.0, "train/lm_weight": 1.0}, {"step": 1, "train/kd_weight": 0.5 + seed}]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def cells(page: str, start: str, table: int = 0) -> list[str]:
    lines = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")]


def test_the_page_holds_means_spreads_costs_weights_and_what_was_forgotten(tmp_path: Path) -> None:
    right = [{"kd": [1, 1, 1, 0], "sft": [1, 0, 0, 0]}, {"kd": [1, 1, 0, 0], "sft": [1, 0, 1, 0]}]
    folders = [seed_folder(tmp_path, seed, answers) for seed, answers in enumerate(right)]
    page = write_table(folders, tmp_path / "table.md").read_text()
    assert cells(page, "kd")[1:] == ["1,350", "10 +- 1", "1.50 +- 0.00", "2.000 +- 0.000", "0.550 +- 0.071"]
    assert cells(page, "cache (cache_teacher)")[2] == "40"
    assert cells(page, "kd", 1)[1] == "0.625 +- 0.177"
    difference, _, _, by_seed, questions = cells(page, "kd - sft")[1:]
    assert (difference, by_seed, questions) == ("+25.0", "+50.0, +0.0", "4")
    assert cells(page, "kd", 2)[1:] == ["1.000 +- 0.707", "1.000 +- 0.000"]
    assert cells(page, "kd", 3)[1] == "1.000 to 1.300 (+0.300 +- 0.141)"


def test_seeds_are_averaged_by_question_before_questions_are_drawn(tmp_path: Path) -> None:
    a = [answer_file(tmp_path / f"a{seed}.jsonl", right) for seed, right in enumerate(([1, 0, 1, 1], [1, 1, 0, 1]))]
    b = [answer_file(tmp_path / f"b{seed}.jsonl", right) for seed, right in enumerate(([0, 1, 0, 1], [1, 0, 1, 0]))]
    pooled = compare_answers_of_seeds(list(zip(a, b)))
    assert pooled.num_rows == 4
    assert pooled.difference == statistics.fmean([0.5, 0.0, 0.0, 0.5])
    once = compare_answers(a[0], b[0])
    assert compare_answers_of_seeds([(a[0], b[0])] * 3) == once  # copies of a seed narrow nothing


def test_spreads_are_of_samples_and_missing_values_leave_the_cell_empty() -> None:
    assert spread([1.0, 2.0, 3.0], 1) == "2.0 +- 1.0"
    assert spread([2.0], 2) == "2.00"
    assert spread([1.0, None], 1) == ""
    assert spread([], 1) == ""


def test_folders_of_other_chains_and_without_a_summary_are_refused(tmp_path: Path) -> None:
    one = seed_folder(tmp_path, 0, {"kd": [1], "sft": [0]})
    other = seed_folder(tmp_path, 1, {"kd": [1], "sft": [0]}, stages=[])
    with pytest.raises(ValueError, match=r"has stages \[\], .* set folders to seeds of one chain"):
        write_table([one, other], tmp_path / "table.md")
    with pytest.raises(ValueError, match="no summary"):
        write_table([one, tmp_path / "nothing"], tmp_path / "table.md")
