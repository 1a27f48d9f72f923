from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from datamodules.captions import CaptionDataModule
from datamodules.instructions import InstructionDataModule
from datamodules.preferences import PreferenceDataModule
from datamodules.rejections import RejectionLog
from datamodules.steps import Step, StepLoader
from moevlm.batch import DEFAULT_VIEW
from moevlm.preprocessing.images import ImageTransform
from moevlm.preprocessing.processor import Processor
from moevlm.preprocessing.tokenizer_training import train_tokenizer
from tests.samples import llava_record, make_shards, preference_record, small_processor

RECORDS = [llava_record(number) for number in range(20)]


def instructions(shards: Path, **options: Any) -> InstructionDataModule:
    settings = {"num_steps": 6, "global_batch_size": 8, "micro_batch_size": 2, **options}
    return InstructionDataModule([{"name": "made_up", "shards": str(shards)}], small_processor(), **settings)


def keys_of(module: Any) -> list[list[str]]:
    return [[key for batch in step for key in batch.keys] for step in module.train_dataloader()]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"), RECORDS, samples_per_shard=6)


def test_an_item_is_the_step_of_a_rank_in_micro_batches(shards: Path) -> None:
    loader = instructions(shards).train_dataloader()
    steps = list(loader)
    assert len(loader) == len(steps) == 6
    assert [len(step) for step in steps] == [4] * 6
    assert {batch.num_sequences for step in steps for batch in step} == {2}
    assert [step[0].position for step in steps] == [0, 8, 16, 24, 32, 40]


def test_every_sample_is_read_once_an_epoch(shards: Path) -> None:
    keys = [key for step in keys_of(instructions(shards, num_steps=5)) for key in step]
    assert sorted(keys[:20]) == sorted(keys[20:]) == [record["id"] for record in RECORDS]
    assert keys[:20] != keys[20:]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_nothing(shards: Path, num_workers: int) -> None:
    assert keys_of(instructions(shards, num_workers=num_workers)) == keys_of(instructions(shards))


def test_another_number_of_ranks_reads_the_same_samples_at_each_step(shards: Path) -> None:
    alone = keys_of(instructions(shards))
    ranks = [keys_of(instructions(shards, rank=rank, world_size=2)) for rank in range(2)]
    for step, keys in enumerate(alone):
        assert sorted(ranks[0][step] + ranks[1][step]) == sorted(keys)


def test_the_seed_decides_the_order(shards: Path) -> None:
    assert keys_of(instructions(shards, seed=1)) != keys_of(instructions(shards))


def test_a_restored_position_goes_on_where_the_run_stopped(shards: Path) -> None:
    first, second = instructions(shards), instructions(shards)
    second.load_state_dict({**first.state_dict(), "samples_consumed": 16})
    assert keys_of(second) == keys_of(first)[2:]
    assert second.state_dict()["samples_consumed"] == 16


def test_a_position_in_other_data_is_refused_with_what_differs(shards: Path, tmp_path: Path) -> None:
    state = instructions(shards).state_dict()
    with pytest.raises(ValueError, match="seed was 0, is 3"):
        instructions(shards, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match="global_batch_size was 8, is 4"):
        instructions(shards, global_batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match="sources was"):
        instructions(make_shards(tmp_path, RECORDS[:9])).load_state_dict(state)
    instructions(shards, rank=0, world_size=4, num_workers=2).load_state_dict(state)


def test_sources_are_mixed_and_named_in_the_batch(shards: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path, [llava_record(number, id=f"other{number}") for number in range(10)])
    sources = [{"name": "a", "shards": str(shards), "weight": 1}, {"name": "b", "shards": str(other), "weight": 3}]
    module = InstructionDataModule(sources, small_processor(), num_steps=20, global_batch_size=8, micro_batch_size=8)
    batches = [batch for step in module.train_dataloader() for batch in step]
    owners = [int(source) for batch in batches for source in batch.sources]
    keys = [key for batch in batches for key in batch.keys]
    assert all(key.startswith("other") == bool(owner) for key, owner in zip(keys, owners))
    assert 0.6 < sum(owners) / len(owners) < 0.9


def test_captions_are_single_rounds_with_images(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, RECORDS)
    module = CaptionDataModule(
        [{"shards": str(shards)}],
        small_processor("plain"),
        num_steps=5,
        global_batch_size=4,
        micro_batch_size=4,
        max_rejected_fraction=0.5,
    )
    loader = module.train_dataloader()
    assert {batch.num_images for step in loader for batch in step} == {4}
    assert loader.rejections.reasons["not_a_caption"] >= 4


def test_a_pair_is_one_sample_and_two_sequences_of_one_micro_batch(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [preference_record(number) for number in range(6)])
    module = PreferenceDataModule(
        [{"shards": str(shards)}], small_processor(), num_steps=3, global_batch_size=4, micro_batch_size=2
    )
    for step in module.train_dataloader():
        assert len(step) == 2
        for batch in step:
            assert batch.num_pairs == 2
            assert batch.num_sequences == 4
            assert batch.is_chosen.tolist() == [True, False, True, False]
            assert batch.keys[0] == batch.keys[1]
    pair_ids = [int(pair) for step in module.train_dataloader() for batch in step for pair in batch.pair_ids]
    assert len(set(pair_ids)) == 12


def test_a_teacher_with_another_transform_gets_a_view_of_its_own(shards: Path) -> None:
    teacher = Processor(small_processor().tokenizer, "chatml", ImageTransform(6))
    (step, *_) = instructions(shards, teacher_processor=teacher).train_dataloader()
    assert step[0].images["teacher"].shape[-1] == 6
    assert step[0].images[DEFAULT_VIEW].shape[-1] == 8
    (step, *_) = instructions(shards, teacher_processor=small_processor()).train_dataloader()
    assert list(step[0].images) == [DEFAULT_VIEW]


def test_a_teacher_of_another_tokenizer_is_refused(shards: Path) -> None:
    teacher = Processor(train_tokenizer(["zebra zoo"] * 5, vocabulary_size=280), "chatml", ImageTransform(6))
    with pytest.raises(ValueError, match="same tokenizer family"):
        instructions(shards, teacher_processor=teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 7}, "multiple of micro_batch_size \\* world_size = 2 \\* 1, got 7"),
        ({"world_size": 3}, "set data.global_batch_size"),
        ({"num_steps": 0}, "set data.num_steps"),
        ({"micro_batch_size": 0}, "set data.micro_batch_size"),
        ({"reader": "magic"}, "indexed, streaming"),
        ({"max_rejected_fraction": 2}, "set data.max_rejected_fraction"),
    ],
)
def test_bad_settings_name_their_key(shards: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instructions(shards, **options).train_dataloader()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"shard": "x"}], "unknown keys .'shard'., known are name, shards"),
        ([{"name": "x"}], "needs either shards or json"),
        ([{"name": "x", "shards": "a"}, {"name": "x", "shards": "b"}], "repeats a name"),
    ],
)
def test_bad_sources_name_what_is_allowed(sources: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstructionDataModule(sources, small_processor(), num_steps=1, global_batch_size=1, micro_batch_size=1)


def test_missing_shards_show_before_a_model_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source made_up: no shards at"):
        instructions(tmp_path / "nowhere").setup("fit")
    module = InstructionDataModule((), small_processor(), num_steps=1, global_batch_size=1, micro_batch_size=1)
    with pytest.raises(ValueError, match="nothing to train on"):
        module.train_dataloader()


class _Slow(Dataset[Step]):
    def __getitem__(self, number: int) -> Step:
        time.sleep(0.05)
        return Step(num_samples=1)


def test_the_loader_counts_how_long_it_was_waited_for() -> None:
    loader = StepLoader(_Slow(), RejectionLog(None), num_steps=3)
    began = time.perf_counter()
    for _ in loader:
        time.sleep(0.05)
    assert 0.15 <= loader.waited_seconds <= time.perf_counter() - began - 0.15 + 1e-3
