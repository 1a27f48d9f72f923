"""Micro-batches of a token budget, and shares by epochs and tokens."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datamodules.instructions import InstructionDataModule
from datamodules.plans import lengths_of
from datamodules.preferences import PreferenceDataModule
from datamodules.sources import Source
from moevlm.data import packing
from moevlm.data.lengths import lengths_path
from tests.samples import conversation, llava_record, make_shards, preference_record, small_processor

VISUAL, BUDGET = 9, 160


def records(count: int, prefix: str = "s") -> list[dict[str, Any]]:
    """One in five without an image, answers of six lengths."""
    made = []
    for number in range(count):
        turns = conversation("<image>?" if number % 5 != 4 else "?", "yes " + "grass " * (number % 7))
        made.append(llava_record(number, id=f"{prefix}{number:04d}", conversations=turns))
    return made


def module_of(*folders: Path, shares: Any = ({}, {}), kind: Any = InstructionDataModule, **options: Any) -> Any:
    settings = {"num_steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "pack_tokens": BUDGET, **options}
    sources = [{"name": f.parent.name, "shards": str(f), **share} for f, share in zip(folders, shares)]
    return kind(sources, small_processor(max_length=140, num_visual_tokens=VISUAL), **settings)


def rows_of(module: Any) -> list[list[tuple[str, ...]]]:
    return [[batch.keys for batch in step] for step in module.train_dataloader()]


def tokens(batch: Any) -> int:
    return int(batch.num_text_tokens + (VISUAL - 1) * batch.num_images)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("packing") / "a", records(60), samples_per_shard=9)


def test_rows_keep_the_budget_with_images_counted_and_waste_little(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packing.PackedPlan.__init__.__kwdefaults__, "window", 60)
    batches = [batch for step in module_of(shards).train_dataloader() for batch in step]
    assert len(batches) == 12 * 4
    assert max(tokens(batch) for batch in batches) <= BUDGET
    assert len({batch.num_sequences for batch in batches}) > 1
    assert module_of(shards)._packed(module_of(shards)._indexed_steps().plan).waste() <= 0.05


def test_an_epoch_holds_every_sample_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(shards, num_steps=100)
    keys: list[str] = []
    for step in module.train_dataloader():
        keys += [key for batch in step for key in batch.keys]
        if len(keys) > packing.WINDOW:
            break
    counts = Counter(keys[: packing.WINDOW])
    assert set(counts) == {f"s{number:04d}" for number in range(60)}
    assert max(counts.values()) - min(counts.values()) <= packing.WINDOW // 60


def test_ranks_and_workers_share_the_rows_of_each_step(shards: Path) -> None:
    whole = rows_of(module_of(shards))
    assert rows_of(module_of(shards, num_workers=2)) == whole
    ranks = [rows_of(module_of(shards, rank=rank, world_size=2)) for rank in range(2)]
    for step, first, second in zip(whole, *ranks):
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(step)


def test_a_resumed_run_reads_the_rows_of_an_unbroken_one(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packing.PackedPlan.__init__.__kwdefaults__, "window", 60)
    whole, resumed = rows_of(module_of(shards, num_steps=30)), module_of(shards, num_steps=30)
    stopped = module_of(shards, num_steps=30)
    stopped.train_dataloader()
    stopped._samples_consumed = 20 * 8
    state = pickle.loads(pickle.dumps(stopped.state_dict()))
    assert state["packing"][0] > 0
    resumed.load_state_dict(state)
    assert rows_of(resumed) == whole[20:]
    with pytest.raises(ValueError, match=r"pack_tokens was 160, is 200"):
        module_of(shards, pack_tokens=200).load_state_dict(state)


def test_pairs_stay_together_and_count_twice(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "p", [preference_record(number) for number in range(30)])
    for step in module_of(folder, kind=PreferenceDataModule, pack_tokens=300).train_dataloader():
        for batch in step:
            assert batch.num_pairs * 2 == batch.num_sequences
            assert tokens(batch) <= 300


def test_a_sample_that_cannot_be_used_leaves_its_row_and_is_named(tmp_path: Path) -> None:
    bad = llava_record(4, id="bad", conversations=conversation("?", "grass " * 300))
    folder = make_shards(tmp_path / "b", [*records(30), bad])
    module = module_of(folder, rejected_folder=tmp_path / "run")
    rows = rows_of(module)
    assert module.train_rejections is not None
    assert set(module.train_rejections.reasons) == {"too_long"}
    assert all("bad" not in row for step in rows for row in step)
    assert all(row for step in rows for row in step)


def test_lengths_are_counted_once_and_kept(shards: Path) -> None:
    processor = small_processor(max_length=140, num_visual_tokens=VISUAL)
    found = lengths_of(Source("s", str(shards)), processor)
    path = lengths_path(shards, processor.token_hash())
    written = path.stat().st_mtime_ns
    assert (lengths_of(Source("s", str(shards)), processor) == found).all()
    assert path.stat().st_mtime_ns == written


def test_sources_take_epochs_or_token_budgets(shards: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "o", records(20, prefix="o"))
    options = {"num_steps": 500, "pack_tokens": None}

    def shares(first: dict[str, float], second: dict[str, float]) -> list[float]:
        plan = module_of(shards, other, shares=(first, second), **options)._indexed_steps().plan
        return [slots / sum(plan.slots) for slots in plan.slots]

    assert shares({"epochs": 1}, {"epochs": 3}) == pytest.approx([0.5, 0.5], abs=1e-3)
    assert shares({"epochs": 2}, {}) == pytest.approx([6 / 7, 1 / 7], abs=1e-3)
    processor = small_processor(max_length=140, num_visual_tokens=VISUAL)
    means = [lengths_of(Source("s", str(folder)), processor).mean() for folder in (shards, other)]
    by_tokens = shares({"tokens": 3e6}, {"tokens": 1e6})
    assert by_tokens[0] * means[0] / (by_tokens[1] * means[1]) == pytest.approx(3, rel=1e-2)
    with pytest.raises(ValueError, match=r"weighed by weight and epochs; choose one"):
        shares({"weight": 1}, {"epochs": 3})
    with pytest.raises(ValueError, match=r"epochs must be positive, got 0"):
        shares({"epochs": 0}, {})
