"""Two thousand seeded mutations of records, images and tars: no crash, no hang, every good sample exactly once."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datamodules.instructions import encode_conversation
from moevlm.batch import Record
from moevlm.data.image_files import check_image
from moevlm.data.index import index_path, read_index
from moevlm.data.reader import IndexedShards
from moevlm.data.records import read_records
from moevlm.data.rejection import RejectedRecord, Rejection
from moevlm.data.shards import write_shards
from moevlm.data.streaming import stream
from moevlm.preprocessing.images import ImageTransform
from moevlm.preprocessing.rejection import RejectedSample
from tests.samples import image_bytes, llava_record, make_shards, preference_record, small_processor

pytestmark = pytest.mark.timeout(120)
NUM_RECORDS, NUM_IMAGES, NUM_TARS = 1200, 600, 400
ODD: list[Any] = [
    None, True, 0, -1, 10**400, 1e308, float("nan"), "", " ", "\0", "\ud800", "\u2028", "<image>", "<image>" * 50,
    "a" * 600_000, "../../etc/passwd", "/dev/zero", "/dev/stdin", "C:\\x", "..", ".", "a.b", "\x1b[2J", "<|im_end|>",
    [], {}, [[]], [None], {"from": "human"}, {"from": "gpt", "value": "x"}, ["a.png"] * 40, ["0.png", 3], "0.png",
    b"\xff".decode("latin1") * 400, "{{ 7 * 7 }}",
]  # fmt: skip
HEADS = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF89a",
    b"RIFF\0\0\0\0WEBP",
    b"BM",
    b"II*\0",
    b"%!PS-Adobe",
    b"<svg>",
)


def mutate_value(value: Any, chance: random.Random) -> Any:
    """The same tree with something replaced, dropped or repeated somewhere."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        what = chance.random()
        if what < 0.6:
            value[key] = mutate_value(value[key], chance)
        elif what < 0.75:
            del value[key]
        elif isinstance(value, list):
            value.insert(key, copy.deepcopy(chance.choice(value)))
        else:
            value[chance.choice(["id", "image", "chosen", "conversations", "\ud800", "x" * 2000])] = chance.choice(ODD)
        return value
    if isinstance(value, str) and chance.random() < 0.3:
        cut = chance.randrange(len(value) + 1)
        return value[:cut] + str(chance.choice(ODD))[:1000] + value[cut:]
    return copy.deepcopy(chance.choice(ODD))


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flipped, cut, repeated or overwritten bytes."""
    mutant = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        if not mutant:
            break
        at, what = chance.randrange(len(mutant)), chance.randrange(5)
        if what == 0:
            mutant[at] = chance.randrange(256)
        elif what == 1:
            del mutant[at:]
        elif what == 2:
            del mutant[at : at + chance.randrange(1, 64)]
        elif what == 3:
            mutant[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
        else:
            mutant[at:at] = mutant[at : at + chance.randrange(1, 600)]
    return bytes(mutant)


def test_records(tmp_path: Path) -> None:
    chance, lines, good = random.Random(1), [], []
    for number in range(NUM_RECORDS):
        record = preference_record(number) if number % 7 == 0 else llava_record(number)
        record["id"] = f"mutant{number}"
        record = mutate_value(record, chance)
        line = json.dumps(record).encode()
        if number % 4 == 0:
            line = mutate_bytes(line, chance).replace(b"\n", b" ")
        lines.append(line or b"?")
        if number % 6 == 0:
            good.append(f"good{number}")
            lines.append(json.dumps(llava_record(1, id=good[-1], image="0.png")).encode())
    (tmp_path / "images").mkdir()
    for number in range(0, NUM_RECORDS, 3):
        (tmp_path / "images" / f"{number}.png").write_bytes(image_bytes(number))
    (tmp_path / "r.jsonl").write_bytes(b"\n".join(lines))
    manifest = write_shards(
        read_records(tmp_path / "r.jsonl", tmp_path / "images"), tmp_path / "out", max_rejected_fraction=1.0
    )
    shards, processor = IndexedShards(tmp_path / "out"), small_processor(max_length=300, overlong="drop_rounds")
    records = [shards.read(number) for number in range(len(shards))]  # what was converted can be read
    assert manifest["num_samples"] + manifest["num_rejected"] == sum(1 for line in lines if line.strip())
    assert manifest["num_rejected"] > NUM_RECORDS // 3
    keys = Counter(record.key for record in records)
    assert max(keys.values()) == 1
    assert [key for key in keys if key.startswith("good")] == good
    for record in records:  # and encoded, or rejected by name
        if record.key.startswith("good"):
            encode_conversation(processor, record, 0, 0).with_images()
        else:
            with contextlib.suppress(RejectedSample):
                encode_conversation(processor, record, 0, 0).with_images()


def test_images() -> None:
    chance, transform, outcomes = random.Random(2), ImageTransform(16), Counter[str]()
    formats = [
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("BMP", "RGB"),
    ]
    originals = [image_bytes(7, (40, 30), kind, mode) for kind, mode in formats]
    for number in range(NUM_IMAGES):
        data = originals[number % len(originals)]
        mutant = chance.choice(HEADS) + data[8:] if number % 9 == 0 else mutate_bytes(data, chance)
        for decode in (check_image, transform):
            try:
                decode(mutant)  # type: ignore[operator]
                outcomes["ok"] += 1
            except (RejectedRecord, RejectedSample) as rejected:
                outcomes[rejected.reason] += 1
    assert outcomes["ok"] > NUM_IMAGES // 10
    assert outcomes["unreadable_image"] > NUM_IMAGES // 2


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("fuzz"), [llava_record(n) for n in range(8)]) / "000000.tar"


def spans(tar: Path) -> list[tuple[str, int, int]]:
    """(key, first header byte, end of content) of every sample of an intact tar."""
    index = read_index(tar)
    rows = []
    for number in range(len(index)):
        members = index.members(number)
        rows.append((str(index.keys[number]), members[0][1] - 512, members[-1][1] + members[-1][2]))
    return rows


def test_tars_without_an_index(shard: Path, tmp_path: Path) -> None:
    """Damage in a tar costs what stands at it and after it, never a sample before it."""
    chance, whole, rows, tar = random.Random(3), shard.read_bytes(), spans(shard), tmp_path / "x.tar"
    for number in range(NUM_TARS):
        header = chance.randrange(len(rows))
        at = rows[header][1] + chance.choice((0, 100, 124, 136, 148, 156, 157, 257, 345, 500))
        damaged = (
            whole[:at] + mutate_bytes(whole[at : at + chance.choice((1, 12, 512, 4096))], chance) + whole[at + 512 :]
        )
        tar.write_bytes(_with_checksum(damaged, rows[header][1]) if number % 3 == 0 else damaged)
        before = [key for key, _, end in rows if end <= at]
        streamed = list(stream([str(tar)]))
        assert [one.key for one in streamed if isinstance(one, Record)][: len(before)] == before
        index_path(tar).unlink(missing_ok=True)
        try:
            shards = IndexedShards(tar)
        except ValueError as error:
            assert "no sample in" in str(error)  # noqa: PT017
            assert not before
            continue
        found = [_read(shards, number) for number in range(len(shards))]
        keys = [one.key for one in found if isinstance(one, Record)]
        assert keys[: len(before)] == before
        assert len(set(keys)) == len(keys)


def test_tars_with_an_index(shard: Path, tmp_path: Path) -> None:
    """With an index, every sample whose own bytes are whole is delivered, wherever the damage is."""
    chance, whole, rows = random.Random(4), shard.read_bytes(), spans(shard)
    (tmp_path / "s").mkdir()
    for file in shard.parent.iterdir():
        (tmp_path / "s" / file.name).write_bytes(file.read_bytes())
    for _ in range(NUM_TARS):
        at = chance.randrange(len(whole) - 9000)
        count = chance.choice((1, 50, 700))
        cut = chance.random() < 0.2
        noise = b"" if cut else chance.randbytes(count) + whole[at + count :]
        (tmp_path / "s" / shard.name).write_bytes(whole[:at] + noise)
        end = len(whole) if cut else at + count
        intact = [key for key, first, last in rows if last <= at or first >= end]
        shards = IndexedShards(tmp_path / "s")
        found = [_read(shards, number) for number in range(len(rows))]
        keys = [one.key for one in found if isinstance(one, Record)]
        assert [key for key in keys if key in intact] == intact


def test_tars_of_odd_members(tmp_path: Path) -> None:
    chance = random.Random(5)
    kinds = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
    text = json.dumps(llava_record(4)).encode()
    for number in range(NUM_TARS):
        tar, good = tmp_path / f"{number}.tar", []
        with tarfile.open(tar, "w", format=chance.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as archive:
            for member in range(6):
                if chance.random() < 0.4:
                    good.append(f"good{member}")
                    header, data = tarfile.TarInfo(f"good{member}.json"), text
                else:
                    name = str(chance.choice(ODD))[:300].encode("utf-8", "replace").decode().replace("\0", "0")
                    header = tarfile.TarInfo(name + chance.choice((".json", ".png", ".pkl", "", ".0.png", "/.json")))
                    header.type, data = chance.choice(kinds), chance.choice((b"", text, b"\x80\x04.", image_bytes()))
                    header.linkname = chance.choice(("/etc/passwd", "good1.json", "../x"))
                header.size = len(data) if header.type == tarfile.REGTYPE else 0
                archive.addfile(header, io.BytesIO(data) if header.size else None)
        streamed = [one.key for one in stream([str(tar)]) if isinstance(one, Record)]
        assert [key for key in streamed if key.startswith("good")] == good
        if good:
            shards = IndexedShards(tar)
            found = [_read(shards, number) for number in range(len(shards))]
            assert [one.key for one in found if isinstance(one, Record)] == streamed


def _read(shards: IndexedShards, number: int) -> Record | Rejection:
    try:
        return shards.read(number)
    except RejectedRecord as rejected:
        return Rejection(shards.name(number), rejected.reason, rejected.detail)


def _with_checksum(data: bytes, at: int) -> bytes:
    """The header at a byte made valid again, so that its lies are believed."""
    header = bytearray(data[at : at + 512].ljust(512, b"\0"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]
