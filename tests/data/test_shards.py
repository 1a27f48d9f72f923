from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import webdataset

from moevlm.batch import Record
from moevlm.data.records import read_records
from moevlm.data.rejection import Rejection
from moevlm.data.shards import write_shards
from tests.samples import conversation, image_bytes, llava_record, make_shards, write_llava

TWO_IMAGES = {"id": "two", "image": ["a.png", "b.jpg"], "conversations": conversation("<image><image>?", "yes")}


def test_webdataset_itself_reads_the_shards(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.jpg").write_bytes(image_bytes(image_format="JPEG"))
    shards = make_shards(tmp_path, [llava_record(0), TWO_IMAGES, llava_record(4)])
    samples = list(webdataset.WebDataset(str(shards / "000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["s0000", "two", "s0004"]
    assert samples[0]["png"] == (tmp_path / "images" / "0.png").read_bytes()
    assert {name for name in samples[1] if not name.startswith("__")} == {"json", "0.png", "1.jpg"}
    assert json.loads(samples[1]["json"])["conversations"] == TWO_IMAGES["conversations"]
    assert "png" not in samples[2]


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    records = [llava_record(number) for number in range(9)]
    first, second = make_shards(tmp_path / "a", records), make_shards(tmp_path / "b", records)
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_the_manifest_counts_samples_bytes_and_checksums(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [llava_record(n) for n in range(10)], samples_per_shard=4, licence="CC0-1.0")
    manifest = json.loads((shards / "manifest.json").read_text())
    assert [shard["num_samples"] for shard in manifest["shards"]] == [4, 4, 2]
    assert (manifest["num_samples"], manifest["num_images"], manifest["num_pairs"]) == (10, 8, 0)
    assert manifest["licence"] == "CC0-1.0"
    for shard in manifest["shards"]:
        data = (shards / shard["file"]).read_bytes()
        assert len(data) == shard["num_bytes"]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]


def test_a_shard_ends_at_its_size_in_bytes_too(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [llava_record(n) for n in range(4)], samples_per_shard=99, bytes_per_shard=1)
    assert len(list(shards.glob("*.tar"))) == 4


def test_rejections_are_counted_in_the_manifest_and_named_in_a_file(tmp_path: Path) -> None:
    records = [llava_record(0), {"id": "bad"}, {"id": "a.b", "conversations": conversation("x", "y")}]
    shards = make_shards(tmp_path, records, max_rejected_fraction=0.9)
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["num_samples"] == 1
    assert manifest["rejected"] == {"key_with_dot": 1, "no_turns": 1}
    rows = [json.loads(line) for line in (shards / "rejected.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rows] == [("bad", "no_turns"), ("a.b", "key_with_dot")]


def test_too_many_rejections_end_in_one_line_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 records were rejected \(no_turns 1\)") as caught:
        make_shards(tmp_path, [llava_record(0), {"id": "bad"}])
    assert "\n" not in str(caught.value)
    assert "max_rejected_fraction" in str(caught.value)
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_a_systematic_fault_stops_the_conversion_early(tmp_path: Path) -> None:
    def faulty():
        for number in range(1000):
            yield Rejection(str(number), "no_turns")
        raise AssertionError("read on")

    with pytest.raises(ValueError, match="1000 of 1000"):
        write_shards(faulty(), tmp_path)


def test_an_interrupted_conversion_leaves_no_manifest_and_no_half_tar(tmp_path: Path) -> None:
    json_file, images = write_llava(tmp_path, [llava_record(0)])
    (record,) = read_records(json_file, images)

    def interrupted():
        yield record
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path / "shards")
    assert [file.name for file in (tmp_path / "shards").iterdir()] == ["rejected.jsonl"]


def test_finished_shards_are_overwritten_only_when_asked(tmp_path: Path) -> None:
    make_shards(tmp_path, [llava_record(0)])
    with pytest.raises(ValueError, match="set overwrite=true"):
        make_shards(tmp_path, [llava_record(0)])
    make_shards(tmp_path, [llava_record(0), llava_record(1)], overwrite=True)
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["num_samples"] == 2


def test_records_made_in_code_are_checked_as_well(tmp_path: Path) -> None:
    json_file, images = write_llava(tmp_path, [llava_record(0)])
    (good,) = read_records(json_file, images)
    assert isinstance(good, Record)
    bad = [Record("a.b", good.turns, good.images), Record("c", good.turns, (b"no image",))]
    manifest = write_shards([good, *bad], tmp_path / "shards", max_rejected_fraction=1.0)
    assert manifest["rejected"] == {"key_with_dot": 1, "unreadable_image": 1}


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record to write"):
        write_shards([], tmp_path)
    with pytest.raises(ValueError, match="samples_per_shard must be at least 1"):
        write_shards([], tmp_path, samples_per_shard=0)
