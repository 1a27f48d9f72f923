from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.instructions import InstructionDataModule
from moevlm.data.index import read_index
from moevlm.data.rejection import RejectedRecord
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.rejection import RejectedSample
from tests.samples import conversation, llava_record, make_shards, small_processor

LONG = {"id": "long", "conversations": conversation("What?", "grass " * 200)}
RECORDS = [llava_record(number) for number in range(19)]


def module_of(shards: Path, **options: Any) -> InstructionDataModule:
    settings = {"num_steps": 5, "global_batch_size": 4, "micro_batch_size": 2, **options}
    return InstructionDataModule(
        [{"name": "made_up", "shards": str(shards)}], small_processor(max_length=100), **settings
    )


def keys_of(loader: Any) -> list[list[str]]:
    return [[key for batch in step for key in batch.keys] for step in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_replaced_counted_and_named(tmp_path: Path, num_workers: int) -> None:
    shards = make_shards(tmp_path, [*RECORDS, LONG])
    loader = module_of(shards, rejected_folder=tmp_path / "run", num_workers=num_workers).train_dataloader()
    keys = keys_of(loader)
    assert [len(step) for step in keys] == [4] * 5
    assert loader.rejections.reasons == {"too_long": 1}
    assert loader.rejections.num_seen == 20
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert (row["key"], row["source"], row["reason"], row["split"]) == ("long", "made_up", "too_long", "train")
    assert "max_length is 100" in row["detail"]


def test_a_substitute_shifts_no_other_sample_and_is_the_same_for_all_ranks_and_runs(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [*RECORDS, LONG])
    first = keys_of(module_of(shards).train_dataloader())
    assert keys_of(module_of(shards).train_dataloader()) == first
    ranks = [keys_of(module_of(shards, rank=rank, world_size=2).train_dataloader()) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks)] == [sorted(step) for step in first]
    original = keys_of(
        module_of(make_shards(tmp_path / "whole", [*RECORDS, llava_record(24, id="long")])).train_dataloader()
    )
    differing = [(a, b) for x, y in zip(first, original) for a, b in zip(x, y) if a != b]
    assert [whole for _, whole in differing] == ["long"]


def test_a_broken_tar_costs_its_lost_samples_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = make_shards(tmp_path, RECORDS + [llava_record(20)], samples_per_shard=10)
    tar = shards / "000001.tar"
    tar.write_bytes(tar.read_bytes()[: read_index(tar).members(6)[0][1]])
    with caplog.at_level(logging.WARNING):
        loader = module_of(shards).train_dataloader()
        keys_of(loader)
    assert loader.rejections.reasons["broken_shard"] >= 4
    assert set(loader.rejections.reasons) == {"broken_shard"}
    assert "000001.tar" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_past_the_limit_the_run_ends_in_one_clear_line(tmp_path: Path, num_workers: int) -> None:
    shards = make_shards(tmp_path, [*RECORDS[:10], *({**LONG, "id": f"long{n}"} for n in range(10))])
    loader = module_of(shards, num_workers=num_workers, rejected_folder=tmp_path / "run").train_dataloader()
    with pytest.raises(
        ValueError, match=r"samples were rejected \(too_long \d+\), more than max_rejected_fraction"
    ) as caught:
        keys_of(loader)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "run" / "rejected.jsonl") in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_without_a_usable_sample_ends_in_one_clear_line(tmp_path: Path, num_workers: int) -> None:
    shards = make_shards(tmp_path, [LONG])
    loader = module_of(shards, num_workers=num_workers, max_rejected_fraction=1.0).train_dataloader()
    with pytest.raises(ValueError, match="no usable sample in 32 draws from source made_up") as caught:
        keys_of(loader)
    assert "\n" not in str(caught.value)


def test_a_run_that_ends_in_an_error_leaves_no_worker_behind(tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())
    loader = module_of(make_shards(tmp_path, [LONG]), num_workers=2).train_dataloader()
    with pytest.raises(ValueError, match="samples were rejected") as caught:  # its traceback holds what iterated
        keys_of(loader)
    assert set(multiprocessing.active_children()) <= others, caught


def test_a_resumed_run_names_each_bad_sample_once(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [*RECORDS, LONG])
    keys_of(module_of(shards, num_steps=20, rejected_folder=tmp_path / "run").train_dataloader())
    path = tmp_path / "run" / "rejected.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"split": "tr')  # torn by a kill
    resumed = module_of(shards, num_steps=20, rejected_folder=tmp_path / "run")
    resumed.load_state_dict({"samples_consumed": 40, "fingerprint": resumed.fingerprint()})
    loader = resumed.train_dataloader()
    assert len(path.read_text().splitlines()) == 2
    keys_of(loader)
    assert path.read_text() == whole


def test_no_bad_sample_is_accepted_when_the_limit_is_zero(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [*RECORDS, LONG])
    with pytest.raises(ValueError, match=r"1 of .* train samples were rejected .*; the last was long"):
        keys_of(module_of(shards, max_rejected_fraction=0).train_dataloader())


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_texts_before_images_give_the_batches_and_rejections_of_one_sample_after_another(
    tmp_path: Path, micro_batch_size: int
) -> None:
    records = [llava_record(number) for number in range(10)]
    records.insert(4, LONG)  # rejected by its text
    shards = make_shards(tmp_path, records, samples_per_shard=20)
    tar = shards / "000000.tar"
    members = [member for number in (1, 6) for member in read_index(tar).members(number) if member[0] == "png"]
    data = bytearray(tar.read_bytes())
    for _, offset, size in members:  # rejected by their images
        data[offset : offset + size] = b"x" * size
    tar.write_bytes(bytes(data))
    module = module_of(shards, micro_batch_size=micro_batch_size, num_steps=4)
    dataset = module.train_dataloader().loader.dataset
    for number in range(4):
        found, expected, rejected = dataset[number], [], []
        for position in dataset.positions(number):
            draw = dataset.plan.draw(position)
            for attempt in itertools.count():
                sample = draw.sample if attempt == 0 else dataset.plan.substitute(draw, attempt - 1)
                try:
                    expected.append(module.processor.encode(dataset.readers[0].read(sample), source=draw.source))
                    break
                except (RejectedSample, RejectedRecord) as fault:
                    rejected.append((position, dataset.readers[0].name(sample), fault.reason))
        assert [(one.position, one.key, one.reason) for one in found.rejected] == rejected
        flat = [sample for samples in expected for sample in samples]
        chunks = [flat[start : start + micro_batch_size] for start in range(0, len(flat), micro_batch_size)]
        for batch, chunk in zip(found.batches, chunks, strict=True):
            slow = pack(chunk, number * 4)
            assert (batch.keys, batch.lengths) == (slow.keys, slow.lengths)
            for name in ("input_ids", "labels", "segments", "sources", "pair_ids"):
                assert torch.equal(getattr(batch, name), getattr(slow, name))
            assert torch.equal(batch.images["default"], slow.images["default"])
