import json
import math
from pathlib import Path

import pytest

from moevlm.evaluation.answers import chance_scores, read_answers, score_answers, score_rows, write_answers
from moevlm.evaluation.benchmarks import Benchmark, find_benchmarks
from moevlm.evaluation.overlap import score_overlap
from moevlm.evaluation.perplexity import score_perplexity

VQA_ROW = {"id": "a", "scorer": "vqa", "kind": "count", "gold": "2", "answer": "two"}


def write_records(folder: Path, name: str, **fields: object) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red bus."}]
    (folder / name).write_text(json.dumps([{"id": "x", "image": "pictures/x.png", "conversations": turns, **fields}]))


def test_answers_survive_the_file_and_are_scored_from_it(tmp_path: Path) -> None:
    rows = [VQA_ROW, VQA_ROW | {"id": "b", "answer": "\u00e9 \n"}]
    file = write_answers(tmp_path / "answers" / "vqa.jsonl", rows)
    assert read_answers(file) == rows
    assert score_answers(file.parent) == {"vqa": score_rows(rows)}
    assert [path.name for path in file.parent.iterdir()] == ["vqa.jsonl"]


def test_broken_answer_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no answer file"):
        read_answers(tmp_path / "vqa.jsonl")
    with pytest.raises(ValueError, match="no answer files"):
        score_answers(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"id": ')
    with pytest.raises(ValueError, match="JSON lines"):
        read_answers(tmp_path / "broken.jsonl")
    with pytest.raises(ValueError, match="1 row ids twice"):
        read_answers(write_answers(tmp_path / "twice.jsonl", [VQA_ROW, VQA_ROW]))
    with pytest.raises(ValueError, match="one scorer of"):
        score_rows([VQA_ROW, VQA_ROW | {"scorer": "pope"}])


def test_the_majority_may_come_from_training_rows(tmp_path: Path) -> None:
    write_answers(tmp_path / "vqa.jsonl", [VQA_ROW, VQA_ROW | {"id": "b"}, VQA_ROW | {"id": "c", "gold": "3"}])
    assert chance_scores(tmp_path)["vqa"]["accuracy"] == 2 / 3
    assert chance_scores(tmp_path, training_rows=[{"kind": "count", "gold": "3"}])["vqa"]["accuracy"] == 1 / 3


def test_perplexity_is_per_token_and_not_per_row() -> None:
    rows = [{"gold_nll": 2.0, "num_gold_tokens": 1}, {"gold_nll": 0.0, "num_gold_tokens": 3}, {"id": "unscored"}]
    assert score_perplexity(rows)["perplexity"] == pytest.approx(math.exp(0.5))
    assert score_perplexity([{"id": "unscored"}]) == {}


def test_overlap_takes_the_best_of_several_gold_texts() -> None:
    rows = [{"answer": "a red bus", "gold": ["a blue car", "red bus"]}, {"answer": "", "gold": "bus"}]
    assert score_overlap(rows) == {"word_f1": 0.5, "mean_words": 1.5, "num_rows": 2}
    with pytest.raises(ValueError, match="no rows"):
        score_overlap([])


def test_the_records_decide_how_a_benchmark_is_scored(tmp_path: Path) -> None:
    write_records(tmp_path, "captions_test.json", kind="caption")
    write_records(tmp_path, "scenes_test.json", kind="caption", objects=["bus", "traffic light"])
    write_records(tmp_path, "questions_test.json", kind="colour")
    write_records(tmp_path, "pope_random_test.json", kind="existence")
    found = {benchmark.name: benchmark for benchmark in find_benchmarks(tmp_path, max_new_tokens={"vqa": 3})}
    assert {name: benchmark.scorer for name, benchmark in found.items()} == {
        "captions": "overlap", "pope": "pope", "questions": "vqa", "scenes": "chair",
    }  # fmt: skip
    assert found["questions"].max_new_tokens == 3
    assert found["scenes"].image_folder == tmp_path
    assert found["scenes"].extract is not None
    assert found["scenes"].extract("Two buses and a traffic light") == ["bus", "traffic light"]


def test_a_benchmark_that_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    options = {"name": "x", "files": {}, "image_folder": tmp_path, "max_new_tokens": 1}
    with pytest.raises(ValueError, match="must be one of vqa"):
        Benchmark(scorer="bleu", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs `extract`"):
        Benchmark(scorer="chair", **options)  # type: ignore[arg-type]
    (tmp_path / "odd_test.json").write_text('["text"]')
    with pytest.raises(ValueError, match="JSON objects, got 'text'"):
        find_benchmarks(tmp_path)
