from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moevlm.batch import Record
from moevlm.data import image_files
from moevlm.data.record_format import parse_record, record_to_json
from moevlm.data.records import RecordFile, read_records
from moevlm.data.rejection import Rejection
from tests.samples import conversation, image_bytes, llava_record, preference_record, write_llava

ONE_IMAGE = conversation("<image> What?", "grass")


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bitmap(image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, image_format)
    return buffer.getvalue()


def reasons(tmp_path: Path, records: list[Any], **options: Any) -> list[str]:
    json_file, images = write_llava(tmp_path, records)
    found = read_records(json_file, images, **options)
    return [record.reason if isinstance(record, Rejection) else "ok" for record in found]


def test_a_record_keeps_its_turns_image_bytes_and_extra_keys(tmp_path: Path) -> None:
    json_file, images = write_llava(tmp_path, [llava_record(0, benchmark="vqa")])
    (record,) = read_records(json_file, images)
    assert isinstance(record, Record)
    assert [turn.role for turn in record.turns] == ["user", "assistant"]
    assert record.images == ((images / "0.png").read_bytes(),)
    assert record.metadata == {"image": "0.png", "kind": "count", "benchmark": "vqa"}


def test_a_preference_record_has_chosen_and_rejected_turns(tmp_path: Path) -> None:
    json_file, images = write_llava(tmp_path, [preference_record(0)])
    (record,) = read_records(json_file, images)
    assert isinstance(record, Record)
    assert record.rejected_turns is not None
    assert record.turns[-1] != record.rejected_turns[-1]


def test_several_images_keep_the_order_of_their_tags(tmp_path: Path) -> None:
    turns = conversation("<image> or <image>?", "neither")
    json_file, images = write_llava(tmp_path, [{"id": "a", "image": ["b.png", "a.png"], "conversations": turns}])
    (images / "b.png").write_bytes(image_bytes(7))
    (record,) = read_records(json_file, images)
    assert isinstance(record, Record)
    assert record.images == ((images / "b.png").read_bytes(), (images / "a.png").read_bytes())


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"id": "a", "conversations": []}, "no_turns"),
        ({"id": "a"}, "no_turns"),
        ({"id": "a", "conversations": [{"from": "system", "value": "S"}]}, "no_turns"),
        ({"id": "a", "conversations": [{"from": "human"}]}, "bad_turn"),
        ({"id": "a", "conversations": [{"from": "robot", "value": "x"}]}, "unknown_role"),
        ({"id": "a", "conversations": conversation("x", "y", "z")[1:]}, "turn_order"),
        ({"id": "a", "conversations": conversation("x", " ")}, "empty_answer"),
        ({"id": "a", "conversations": conversation("x", "<image>")}, "image_tag_in_answer"),
        ({"id": "a", "image": "a.png", "conversations": conversation("x", "y")}, "image_tag_mismatch"),
        ({"id": "a", "conversations": ONE_IMAGE}, "image_tag_mismatch"),
        ({"id": "a", "image": 3, "conversations": ONE_IMAGE}, "bad_image_field"),
        ({"id": "a", "image": "../records.json", "conversations": ONE_IMAGE}, "image_outside_folder"),
        ({"id": "a.b", "conversations": conversation("x", "y")}, "key_with_dot"),
        ({"id": "a" * 91, "conversations": conversation("x", "y")}, "key_too_long"),
        ({"id": "/a", "conversations": conversation("x", "y")}, "bad_key"),
        ({"conversations": conversation("x", "y")}, "no_id"),
        ("text", "not_an_object"),
        ({"id": "a", "chosen": conversation("x", "y"), "rejected": conversation("x", "y")}, "identical_pair"),
        ({"id": "a", "chosen": conversation("x", "y"), "rejected": conversation("z", "y")}, "prompt_mismatch"),
        ({"id": "a", "chosen": conversation("x", "y"), "rejected": conversation("x")}, "no_answer"),
        ({"id": "a", "chosen": conversation("x", "y")}, "no_turns"),
    ],
)
def test_a_bad_record_is_rejected_by_name_and_the_rest_kept(tmp_path: Path, record: Any, reason: str) -> None:
    good = {"id": "good", "conversations": conversation("x", "y")}
    assert reasons(tmp_path, [record, good]) == [reason, "ok"]


def test_a_missing_image_is_rejected_with_its_name(tmp_path: Path) -> None:
    json_file, images = write_llava(tmp_path, [llava_record(0), llava_record(1)])
    (images / "0.png").unlink()
    rejected, kept = read_records(json_file, images)
    assert isinstance(rejected, Rejection)
    assert (rejected.key, rejected.reason) == ("s0000", "missing_image")
    assert "0.png" in rejected.detail
    assert isinstance(kept, Record)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-30], "unreadable_image"),
        (lambda data: b"", "unreadable_image"),
        (lambda data: b"<html>not found</html>", "unreadable_image"),
        (lambda data: animation(), "animated_image"),
        (lambda data: bitmap("TIFF"), "unsupported_image_format"),
    ],
)
def test_an_unreadable_image_is_rejected_by_name(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    json_file, images = write_llava(tmp_path, [llava_record(0), llava_record(1)])
    (images / "0.png").write_bytes(damage((images / "0.png").read_bytes()))
    rejected, kept = read_records(json_file, images)
    assert isinstance(rejected, Rejection)
    assert rejected.reason == reason
    assert isinstance(kept, Record)


def test_too_large_an_image_is_rejected_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_PIXELS", 10)
    assert reasons(tmp_path, [llava_record(0)]) == ["image_too_large"]


def test_repeated_ids_are_rejected_unless_keys_come_from_the_index(tmp_path: Path) -> None:
    records = [{"id": "same", "conversations": conversation("x", str(n))} for n in range(3)]
    assert reasons(tmp_path, records) == ["ok", "duplicate_key", "duplicate_key"]
    first, _, third = read_records(tmp_path / "records.json", None, key_from="index")
    assert isinstance(first, Record)
    assert isinstance(third, Record)
    assert (first.key, third.key) == ("000000000", "000000002")
    assert first.metadata["source_id"] == "same"


def test_json_lines_are_read_and_broken_lines_rejected(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"id": "a", "conversations": conversation("x", "y")}) + "\n{broken\n")
    kept, rejected = read_records(path)
    assert isinstance(kept, Record)
    assert isinstance(rejected, Rejection)
    assert rejected.reason == "not_an_object"


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON .line 1"), ("{}", "must hold a JSON list"), (None, "no record file at")]
)
def test_a_bad_record_file_is_one_clear_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "records.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        RecordFile(path)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("make", [llava_record, preference_record])
def test_the_shard_form_of_a_record_reads_back_as_itself(tmp_path: Path, make: Callable[[int], dict]) -> None:
    json_file, images = write_llava(tmp_path, [make(0)])
    (record,) = read_records(json_file, images)
    assert isinstance(record, Record)
    assert parse_record(record.key, record_to_json(record), record.images) == record
