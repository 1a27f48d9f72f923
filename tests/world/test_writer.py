import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moevlm.world import vocabulary as v
from moevlm.world.ground_truth import categories, mentioned_categories
from moevlm.world.records import check_record, majority_accuracy
from moevlm.world.scenes import split_of
from moevlm.world.texts.phrasings import CAPTION_REQUESTS, DESCRIPTION_REQUESTS, OBJECT_REQUESTS, VISUAL_PHRASINGS
from moevlm.world.texts.probes import NEGATIVES, probe_questions
from moevlm.world.texts.text_questions import TEXT_PHRASINGS
from moevlm.world.training_sets import InstructionMix
from moevlm.world.writer import read_scenes, write_world

SIZES = {"num_train": 150, "num_validation": 25, "num_test": 60}

# Highest share of one answer that a kind may have in a test set of this size.
MAJORITY_BOUNDS = {
    "existence": 0.55, "count": 0.35, "attribute": 0.2, "spatial": 0.25, "comparison": 0.4, "reading": 0.25,
    "conversation": 0.25, "text": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "world"
    write_world(folder, seed=4, vqa_per_kind=48, **SIZES)
    return folder


def load(world: Path, name: str) -> Any:
    return json.loads((world / name).read_text())


def record_files(world: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.name: load(world, path.name) for path in sorted(world.glob("*_*.json"))}


def test_the_same_arguments_give_the_same_bytes(world, tmp_path):
    write_world(tmp_path / "again", seed=4, vqa_per_kind=48, **SIZES)

    def digests(folder: Path) -> dict[str, str]:
        files = (p for p in folder.rglob("*") if p.is_file())
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert digests(tmp_path / "again") == digests(world)


def test_every_record_is_valid_and_its_image_is_there(world):
    for name, records in record_files(world).items():
        assert len({r["id"] for r in records}) == len(records), name
        for record in records:
            check_record(record)
            if "image" in record:
                assert (world / "images" / record["image"]).is_file()
                assert record["image"].split("/")[0] in name
                assert Path(record["image"]).stem == record["scene"]


def test_images_have_the_asked_size(world):
    with Image.open(next((world / "images" / "train").iterdir())) as image:
        assert image.size == (96, 96)


def test_scenes_are_read_back_and_lie_in_their_splits(world):
    scenes = read_scenes(world)
    assert Counter(split_of(s) for s in scenes) == {"train": 150, "validation": 25, "test": 60}
    for split in ("train", "validation", "test"):
        images = {p.stem for p in (world / "images" / split).iterdir()}
        assert images == {s.scene_id for s in scenes if split_of(s) == split}


def test_the_summary_counts_what_was_written(world):
    summary = load(world, "world.json")
    assert summary["files"] == {name: len(records) for name, records in record_files(world).items()}
    assert summary["classes"]["categories"] == list(v.CATEGORIES)
    assert summary["records_by_kind"]["vqa_test"] == dict.fromkeys(sorted(MAJORITY_BOUNDS), 48)


REQUESTS = (CAPTION_REQUESTS, DESCRIPTION_REQUESTS, OBJECT_REQUESTS)


def heldout_pattern() -> re.Pattern[str]:
    """Matches a held-out wording; slots are runs of anything but what ends a sentence."""
    templates = [t for form in (VISUAL_PHRASINGS | TEXT_PHRASINGS).values() for t in form["heldout"]]
    templates += [t for requests in REQUESTS for t in requests["heldout"]]
    return re.compile("|".join(re.sub(r"\\\{\w+\\\}", "[^?]+?", re.escape(t)) for t in templates), re.IGNORECASE)


def train_pattern() -> re.Pattern[str]:
    templates = [t for form in (VISUAL_PHRASINGS | TEXT_PHRASINGS).values() for t in form["train"]]
    templates += [t for requests in REQUESTS for t in requests["train"]]
    return re.compile("|".join(re.sub(r"\\\{\w+\\\}", "[^?]+?", re.escape(t)) for t in templates), re.IGNORECASE)


def human_turns(record: dict[str, Any]) -> list[str]:
    messages = record.get("conversations") or record["chosen"] + record["rejected"]
    return [m["value"].removeprefix("<image>\n") for m in messages if m["from"] == "human"]


def test_held_out_phrasings_never_occur_in_training_records(world):
    heldout, trained = heldout_pattern(), train_pattern()
    for name, records in record_files(world).items():
        if not name.startswith(("vqa", "pope", "descriptions")):
            turns = [turn for r in records for turn in human_turns(r)]
            assert [t for t in turns if heldout.fullmatch(t)] == []
            assert all(trained.fullmatch(t) for t in turns)


def test_half_of_the_test_questions_are_in_held_out_phrasings(world):
    vqa = load(world, "vqa_test.json")
    heldout = [r for r in vqa if r["phrasing"] == "heldout"]
    assert len(heldout) == len(vqa) / 2
    assert all(heldout_pattern().fullmatch(human_turns(r)[-1]) for r in heldout)


def test_at_least_half_of_the_test_questions_are_open(world):
    vqa = [r for r in load(world, "vqa_test.json") if "image" in r]
    assert sum(r["open"] for r in vqa) / len(vqa) > 0.5


def test_the_majority_answer_is_rarely_right(world):
    accuracy = majority_accuracy(load(world, "vqa_test.json"))
    assert accuracy.keys() == MAJORITY_BOUNDS.keys()
    assert {k: a for k, a in accuracy.items() if a > MAJORITY_BOUNDS[k]} == {}


def test_closed_questions_are_answered_yes_as_often_as_no(world):
    for name in ("vqa_test.json", "instructions_train.json"):
        messages = [m["value"] for r in load(world, name) for m in r["conversations"]]
        assert messages.count("yes") / (messages.count("yes") + messages.count("no")) == pytest.approx(0.5, abs=0.06)


def test_short_answers_are_lower_case_words(world):
    for record in load(world, "vqa_test.json"):
        assert re.fullmatch(r"[a-z0-9]+( [a-z]+)?", record["conversations"][-1]["value"])


def test_half_of_the_instructions_have_several_turns(world):
    records = load(world, "instructions_train.json")
    several = sum(len(r["conversations"]) > 2 for r in records) / len(records)
    assert 0.35 < several < 0.6


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_probes_are_half_yes_and_agree_with_the_scene(world, negatives):
    scenes = {s.scene_id: s for s in read_scenes(world)}
    records = load(world, f"pope_{negatives}_test.json")
    for record in records:
        (asked,) = mentioned_categories(human_turns(record)[0])
        there = asked in categories(scenes[record["scene"]])
        assert record["conversations"][1]["value"] == ("yes" if there else "no")
        assert record["benchmark"] == f"pope_{negatives}"
    assert sum(r["conversations"][1]["value"] == "yes" for r in records) * 2 == len(records)


def test_adversarial_negatives_are_more_often_partners_of_what_is_there(world):
    scenes = {s.scene_id: s for s in read_scenes(world)}
    shares = {}
    for negatives in NEGATIVES:
        absent = [r for r in load(world, f"pope_{negatives}_test.json") if r["conversations"][1]["value"] == "no"]
        asked = [(mentioned_categories(human_turns(r)[0])[0], categories(scenes[r["scene"]])) for r in absent]
        shares[negatives] = sum(v.PARTNERS[c] in there for c, there in asked) / len(asked)
    assert shares["adversarial"] > 1.3 * shares["random"]


def test_unknown_negatives_are_refused(world):
    with pytest.raises(ValueError, match="unknown negatives 'rare'; known: random"):
        probe_questions(read_scenes(world)[0], "rare", None, 0)


def test_description_records_list_the_objects(world):
    for record in load(world, "descriptions_test.json"):
        assert record["objects"] == mentioned_categories(record["conversations"][1]["value"])


def test_a_folder_in_use_is_refused(world):
    with pytest.raises(ValueError, match="not an empty folder"):
        write_world(world, seed=0, **SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_test": 0}, "num_test must be at least 1, got 0"),
        ({"image_size": 8}, "image_size must be at least 32, got 8"),
        ({"image_format": "gif"}, "unknown image_format 'gif'; known: png, jpg"),
        ({"vqa_per_kind": 0}, "vqa_per_kind must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_world(tmp_path / "w", **({"seed": 0} | SIZES | change))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_mix_is_refused():
    with pytest.raises(ValueError, match="must lie in"):
        InstructionMix(text_only_fraction=2)


def test_progress_and_jpeg(tmp_path):
    calls = []
    sizes = {"num_train": 3, "num_validation": 2, "num_test": 2}
    write_world(
        tmp_path / "w", seed=0, image_format="jpg", vqa_per_kind=2, progress=lambda *c: calls.append(c), **sizes
    )
    assert ("train images", 3, 3) in calls
    assert calls[-1] == ("records", 12, 12)
    assert len(list((tmp_path / "w" / "images").rglob("*.jpg"))) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "id must be a non-empty string"),
        ({"conversations": []}, "turns must be pairs"),
        ({"phrasing": "other"}, "phrasing must be one of"),
        ({"image": "train/x.png"}, "0 image tokens, expected 1"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}, "from human"),
    ],
)
def test_malformed_records_are_named(change, message):
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    with pytest.raises(ValueError, match=message):
        check_record({"id": "r", "kind": "text", "phrasing": "train", "conversations": turns} | change)


def test_a_folder_without_a_world_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"scenes\.jsonl is missing"):
        read_scenes(tmp_path)


def test_several_processes_draw_the_same_world(tmp_path: Path) -> None:
    sizes = {"num_train": 6, "num_validation": 2, "num_test": 2, "image_size": 32, "vqa_per_kind": 2}
    for folder, workers in (("one", 1), ("two", 2)):
        write_world(tmp_path / folder, seed=0, num_workers=workers, **sizes)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert files
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
