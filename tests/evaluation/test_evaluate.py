import json
from pathlib import Path

import pytest
import torch

from moevlm.evaluation.answers import chance_scores, compare_answers, read_answers, score_answers
from moevlm.evaluation.benchmarks import find_benchmarks, vocabulary_extractor
from moevlm.evaluation.evaluate import evaluate_folder
from moevlm.models.pretrained import load_pretrained, save_pretrained
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.images import ImageTransform
from moevlm.preprocessing.processor import Processor
from moevlm.world.writer import write_world
from tests.tiny import IMAGE_SIZE, tiny_decoder_config, tiny_tokenizer, tiny_vlm

OPTIONS = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "world"
    write_world(folder, seed=0, num_train=4, num_validation=2, num_test=5, image_size=48, vqa_per_kind=2)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    decoder = tiny_decoder_config(max_position_embeddings=4096)
    vlm = tiny_vlm({"num_experts": 4, "top_k": 2, "router_init_std": 1.0}, language_model=decoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vlm.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_pretrained(vlm, folder)
    transform = ImageTransform(image_size=IMAGE_SIZE, mean=[0.5] * 3, std=[0.5] * 3, mode="pad")
    Processor(tiny_tokenizer(), "chatml", transform).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(world: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    evaluate_folder(model, data_folder=world, output_folder=folder, limit=9, batch_size=4, **OPTIONS)  # type: ignore[arg-type]
    return folder


def test_every_benchmark_is_answered_and_scored(evaluated: Path) -> None:
    scores = json.loads((evaluated / "scores.json").read_text())
    assert list(scores) == ["descriptions", "pope", "vqa", "experts"]
    assert {"accuracy", "accuracy_open", "perplexity", "num_rejected"} <= scores["vqa"].keys()
    assert {"f1_random", "f1_popular", "f1_adversarial", "yes_ratio"} <= scores["pope"].keys()
    assert {"chair_i", "chair_s", "recall", "mean_words"} <= scores["descriptions"].keys()
    assert scores["pope"]["num_rows"] == 9
    assert scores["descriptions"]["num_rows"] == 5
    assert scores["experts"]["distance"] > 0
    settings = json.loads((evaluated / "evaluation.json").read_text())
    assert len(settings["benchmarks"]["pope"]["files"]["random"]["sha256"]) == 64
    assert settings["decoding"] == "greedy, eager"  # what auto took


def test_rows_hold_all_that_scoring_needs(evaluated: Path) -> None:
    rows = read_answers(evaluated / "answers" / "vqa.jsonl")
    for name in ("id", "kind", "question", "gold", "answer", "phrasing", "open", "gold_nll", "num_gold_tokens", "form"):
        assert any(name in row for row in rows), name
    assert {row["text_only"] for row in rows} >= {False}
    assert not any("<image>" in row["question"] for row in rows)
    assert all("mentioned" in row for row in read_answers(evaluated / "answers" / "descriptions.jsonl"))
    scores = json.loads((evaluated / "scores.json").read_text())
    for name, again in score_answers(evaluated / "answers").items():
        assert again.items() <= scores[name].items()


def test_two_runs_give_equal_files_whatever_the_batch_size(
    evaluated: Path, world: Path, model: Path, tmp_path: Path
) -> None:
    options = OPTIONS | {"perplexity": False}
    for batch_size in (4, 1):
        folder = tmp_path / str(batch_size)
        evaluate_folder(
            model,
            data_folder=world,
            output_folder=folder,
            benchmarks=["vqa"],
            limit=9,
            batch_size=batch_size,
            **options,
        )  # type: ignore[arg-type]
    first, second = (tmp_path / name / "answers" / "vqa.jsonl" for name in ("4", "1"))
    assert first.read_bytes() == second.read_bytes()
    before = [row["answer"] for row in read_answers(evaluated / "answers" / "vqa.jsonl")]
    assert [row["answer"] for row in read_answers(first)] == before


def test_random_routing_changes_answers_and_leaves_no_trace(
    evaluated: Path, world: Path, model: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        evaluate_folder(
            model,
            data_folder=world,
            output_folder=tmp_path / name,
            benchmarks=["vqa"],
            limit=9,
            routing="random",
            **OPTIONS,
        )  # type: ignore[arg-type]
    one, two = ((tmp_path / name / "answers" / "vqa.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    learned = [row["answer"] for row in read_answers(evaluated / "answers" / "vqa.jsonl")]
    assert [json.loads(line)["answer"] for line in one.splitlines()] != learned


def test_perplexity_equals_a_plain_forward_pass(evaluated: Path, world: Path, model: Path) -> None:
    vlm, processor = load_pretrained(model), Processor.from_pretrained(model)
    (benchmark,) = find_benchmarks(world, ["descriptions"])
    row = read_answers(evaluated / "answers" / "descriptions.jsonl")[0]
    _, file, number = next(chosen for chosen in benchmark.select() if chosen[1].name(chosen[2]) == row["id"])
    (sample,) = processor.encode(file.read(number))
    batch = pack([sample])
    with torch.no_grad():
        output = vlm(batch)
        rows_R, targets_R = output.prediction_rows(batch.labels)
        log_probs_RV = vlm.head.logits(output.hidden_states[rows_R]).log_softmax(-1)
    nll = -log_probs_RV.gather(1, targets_R[:, None]).double().sum()
    assert row["num_gold_tokens"] == len(targets_R)
    assert row["gold_nll"] == pytest.approx(float(nll), rel=1e-5)


def test_chance_needs_no_model(evaluated: Path) -> None:
    chance = chance_scores(evaluated / "answers")
    assert chance["pope"]["yes_ratio"] == 1
    assert chance["pope"]["recall"] == 1
    assert chance["vqa"]["accuracy"] > 0
    assert chance["descriptions"]["chair_i"] >= 0
    assert "perplexity" not in chance["vqa"]


def test_a_model_equals_itself_in_comparison(evaluated: Path) -> None:
    file = evaluated / "answers" / "vqa.jsonl"
    assert compare_answers(file, file, num_resamples=50).difference == 0
    with pytest.raises(ValueError, match="right or wrong"):
        compare_answers(evaluated / "answers" / "descriptions.jsonl", file)


def test_unusable_records_are_counted_and_past_a_limit_fatal(world: Path, model: Path, tmp_path: Path) -> None:
    records = json.loads((world / "vqa_test.json").read_text())[:10]
    records[3]["image"] = "test/nowhere.png"
    (tmp_path / "vqa_test.json").write_text(json.dumps(records))
    (tmp_path / "images").symlink_to(world / "images")
    options = OPTIONS | {"data_folder": tmp_path, "output_folder": tmp_path / "eval", "perplexity": False}
    scores = evaluate_folder(model, max_rejected_fraction=0.1, **options)  # type: ignore[arg-type]
    assert scores["vqa"]["num_rejected"] == 1
    with pytest.raises(ValueError, match=r"1 of 10 records are unusable.*missing_image"):
        evaluate_folder(model, max_rejected_fraction=0.05, **options)  # type: ignore[arg-type]


def test_what_cannot_be_evaluated_is_refused(world: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no benchmark"):
        find_benchmarks(tmp_path)
    with pytest.raises(ValueError, match="known: descriptions, pope, vqa"):
        find_benchmarks(world, ["vqa2"])
    with pytest.raises(ValueError, match="learned, random"):
        evaluate_folder(model, data_folder=world, output_folder=tmp_path, routing="none")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        find_benchmarks(world, ["vqa"])[0].select(limit=0)


def test_a_limit_takes_the_same_records_evenly_over_splits(world: Path) -> None:
    (benchmark,) = find_benchmarks(world, ["pope"])
    chosen = [(split, number) for split, _, number in benchmark.select(limit=7)]
    assert [split for split, _ in chosen].count("adversarial") == 2
    assert {split for split, _ in chosen} == {"adversarial", "popular", "random"}
    assert len(chosen) == 7
    assert chosen == [(split, number) for split, _, number in benchmark.select(limit=7)]


def test_a_limit_keeps_kinds_and_answers_in_proportion(world: Path) -> None:
    (pope,) = find_benchmarks(world, ["pope"])
    golds = [file.values[number]["conversations"][-1]["value"] for _, file, number in pope.select(limit=24)]
    assert 10 <= golds.count("yes") <= 14
    (vqa,) = find_benchmarks(world, ["vqa"])
    kinds = [file.values[number]["kind"] for _, file, number in vqa.select(limit=8)]
    assert len(set(kinds)) >= 6


def test_objects_are_found_by_whole_words_longest_first() -> None:
    extract = vocabulary_extractor(["dog", "hot dog", "bus"])
    assert extract("A hot dog by two Buses, dogmatic") == ["bus", "hot dog"]
    assert extract("dogs") == ["dog"]
