from __future__ import annotations

import io
import logging
import pickle
import tarfile
from pathlib import Path

import pytest

from moevlm.data import reader
from moevlm.data.index import index_path, read_index, scan_tar
from moevlm.data.reader import IndexedShards, record_from_members
from moevlm.data.records import read_records
from moevlm.data.rejection import RejectedRecord
from tests.samples import conversation, image_bytes, llava_record, make_shards, preference_record, write_llava

RECORDS = [llava_record(number) for number in range(10)]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def test_any_sample_is_read_as_it_was_converted(tmp_path: Path) -> None:
    shards = IndexedShards(make_shards(tmp_path, RECORDS, samples_per_shard=3))
    converted = list(read_records(tmp_path / "records.json", tmp_path / "images"))
    assert shards.sizes == (3, 3, 3, 1)
    assert [shards.read(number) for number in (9, 0, 5)] == [converted[9], converted[0], converted[5]]
    assert list(shards) == converted
    with pytest.raises(IndexError):
        shards.read(10)


def test_preference_pairs_survive_the_shards(tmp_path: Path) -> None:
    record = IndexedShards(make_shards(tmp_path, [preference_record(0)])).read(0)
    assert record.rejected_turns is not None
    assert record.rejected_turns[0] == record.turns[0]


def test_many_images_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(12):
        (tmp_path / "images" / f"i{number}.png").write_bytes(image_bytes(number))
    names = [f"i{number}.png" for number in range(12)]
    record = {"id": "many", "image": names, "conversations": conversation("<image>" * 12, "yes")}
    images = IndexedShards(make_shards(tmp_path, [record])).read(0).images
    assert list(images) == [image_bytes(number) for number in range(12)]


def test_few_tars_stay_open_and_pickling_opens_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_TARS", 2)
    shards = IndexedShards(make_shards(tmp_path, RECORDS, samples_per_shard=1))
    keys = [shards.read(number).key for number in range(10)]
    assert len(shards._files) == 2
    copy = pickle.loads(pickle.dumps(shards))
    assert not copy._files
    assert [copy.read(number).key for number in range(10)] == keys


def test_foreign_tars_are_indexed_on_first_use(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, RECORDS, samples_per_shard=4)
    expected = list(IndexedShards(folder))
    for tar in folder.glob("*.tar"):
        index_path(tar).unlink()
    shards = IndexedShards(str(folder / "*.tar"))
    assert list(shards) == expected
    assert index_path(folder / "000000.tar").exists()
    assert len(read_index(folder / "000000.tar")) == 4
    assert IndexedShards(sorted(folder.glob("*.tar"))).digest == shards.digest


def test_a_tar_of_another_maker_reads_with_folders_and_unknown_members(tmp_path: Path) -> None:
    text = b'{"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}]}'
    members = {"a/b.c/k1.json": text, "a/b.c/k1.JPG": image_bytes(image_format="JPEG"), "a/b.c/k1.cls": b"3"}
    shards = IndexedShards(write_tar(tmp_path / "x.tar", members))
    assert shards.read(0).key == "a/b.c/k1"
    assert len(shards.read(0).images) == 1


def test_a_broken_tar_is_named_and_its_intact_samples_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_shards(tmp_path, RECORDS, samples_per_shard=5)
    tar = folder / "000001.tar"
    cut = read_index(tar).members(3)[-1][1] + 1
    tar.write_bytes(tar.read_bytes()[:cut])
    with caplog.at_level(logging.WARNING):
        shards = IndexedShards(folder)
    assert "broken tar" in caplog.text
    assert "000001.tar" in caplog.text
    assert [shards.read(number).key for number in (4, 7)] == ["s0004", "s0007"]
    for lost in (8, 9):
        with pytest.raises(RejectedRecord, match="broken_shard"):
            shards.read(lost)
        assert shards.name(lost) == f"s{lost:04d}"
    assert len(list(shards)) == 8


def test_a_broken_tar_without_an_index_keeps_what_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar = make_shards(tmp_path, RECORDS) / "000000.tar"
    tar.write_bytes(tar.read_bytes()[: read_index(tar).members(4)[-1][1] + 1])
    index_path(tar).unlink()
    with caplog.at_level(logging.WARNING):
        shards = IndexedShards(tar)
    assert "4 samples kept" in caplog.text or "5 samples kept" in caplog.text
    assert shards.read(3).key == "s0003"
    assert not index_path(tar).exists()


def test_a_file_that_is_no_tar_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"not a tar at all" * 99)
    index, damage = scan_tar(tmp_path / "x.tar")
    assert len(index) == 0
    assert damage
    with pytest.raises(ValueError, match=r"no sample in .*x.tar"):
        IndexedShards(tmp_path / "x.tar")


def test_a_tar_that_vanishes_during_a_run_costs_its_samples_only(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, RECORDS, samples_per_shard=5)
    shards = IndexedShards(folder)
    (folder / "000001.tar").unlink()
    assert shards.read(0).key == "s0000"
    with pytest.raises(RejectedRecord, match=r"broken_shard: .*000001.tar: No such file"):
        shards.read(7)


def test_an_unfinished_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, RECORDS)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest.json: not finished; run experiments.build_shards"):
        IndexedShards(folder)


def test_missing_shards_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, RECORDS)
    (folder / "000001.tar").unlink()
    with pytest.raises(ValueError, match=r"000001.tar is missing"):
        IndexedShards(folder)
    with pytest.raises(ValueError, match="no shards at"):
        IndexedShards(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["{", "text"])
def test_a_damaged_manifest_or_index_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    folder = make_shards(tmp_path, RECORDS)
    index_path(folder / "000000.tar").write_text(damage)
    with pytest.raises(ValueError, match=r"index.npz is broken"):
        IndexedShards(folder).read(0)
    (folder / "manifest.json").write_text(damage)
    with pytest.raises(ValueError, match=r"manifest.json is not JSON"):
        IndexedShards(folder)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jpg": b""}, "missing_json"),
        ({"json": b"{"}, "broken_json"),
        ({"json": b"[]"}, "not_an_object"),
        ({"json": b"{}"}, "no_turns"),
    ],
)
def test_a_sample_with_damaged_members_is_rejected_by_name(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(RejectedRecord, match=reason):
        record_from_members("k", members)


def test_digests_tell_builds_apart(tmp_path: Path) -> None:
    first = IndexedShards(make_shards(tmp_path / "a", RECORDS))
    second = IndexedShards(make_shards(tmp_path / "b", RECORDS[:-1]))
    assert first.digest != second.digest
    assert write_llava(tmp_path / "c", RECORDS)
