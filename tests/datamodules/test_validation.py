from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from datamodules.evaluation import EvaluationDataModule
from datamodules.instructions import InstructionDataModule
from tests.samples import llava_record, make_shards, small_processor, write_llava

RECORDS = [llava_record(number) for number in range(11)]


def module_of(shards: Path, **options: Any) -> InstructionDataModule:
    source = [{"name": "held_out", "shards": str(shards)}]
    settings = {"num_steps": 1, "global_batch_size": 12, "micro_batch_size": 3, "validation_sources": source, **options}
    return InstructionDataModule(source, small_processor(), **settings)


def items_of(loader: Any) -> list[list[str]]:
    return [[key for batch in step for key in batch.keys] for step in loader]


def test_validation_reads_the_first_samples_in_order(tmp_path: Path) -> None:
    loader = module_of(make_shards(tmp_path, RECORDS), num_validation_samples=7).val_dataloader()
    assert items_of(loader) == [[f"s000{n}" for n in part] for part in ((0, 1, 2), (3, 4, 5), (6,))]
    assert len(loader) == 3
    assert items_of(loader) == items_of(loader)


def test_every_rank_gets_equally_many_items_and_all_samples_are_seen_once(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, RECORDS)
    ranks = [items_of(module_of(shards, rank=rank, world_size=2).val_dataloader()) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 2
    assert sorted(key for rank in ranks for item in rank for key in item) == [record["id"] for record in RECORDS]


def test_samples_fewer_than_the_ranks_are_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = module_of(make_shards(tmp_path, RECORDS[:7]), rank=0, world_size=2)
    with caplog.at_level(logging.WARNING):
        assert len(module.val_dataloader()) == 1
    assert "the last 1 of 7 samples are left out" in caplog.text


def test_without_validation_sources_there_is_no_loader(tmp_path: Path) -> None:
    assert module_of(make_shards(tmp_path, RECORDS), validation_sources=()).val_dataloader() == []


def test_evaluation_gives_each_source_its_own_loader_and_records(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "a", RECORDS)
    json_file, images = write_llava(tmp_path / "b", RECORDS[:4])
    (images / "1.png").unlink()
    sources = [
        {"name": "vqa", "shards": str(shards)},
        {"name": "pope", "json": str(json_file), "image_folder": str(images)},
    ]
    module = EvaluationDataModule(sources, small_processor(), micro_batch_size=2, max_samples=5)
    assert [len(loader) for loader in module.test_dataloader()] == [3, 2]
    vqa, pope = module.val_dataloader()
    assert [key for item in items_of(vqa) for key in item] == [f"s000{n}" for n in range(5)]
    assert [record.key for record in module.records("pope")] == ["s0000", "s0002", "s0003"]
    assert len(items_of(pope)) == 2
    assert pope.rejections.reasons == {"missing_image": 1}
    with pytest.raises(ValueError, match="known are vqa, pope"):
        next(module.records("gqa"))


def test_evaluation_needs_a_source() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        EvaluationDataModule([], small_processor(), micro_batch_size=2)
