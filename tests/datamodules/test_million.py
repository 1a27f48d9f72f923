"""A million samples, which a folder of loose files or a loader that reads skipped data again would not survive."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from datamodules.instructions import InstructionDataModule
from moevlm.batch import Record, Turn
from moevlm.data.shards import write_shards
from tests.samples import small_processor

NUM_SAMPLES, BATCH, RESUMED = 1_000_000, 200, 700_000


def records() -> Iterator[Record]:
    for number in range(NUM_SAMPLES):
        yield Record(f"s{number:07d}", (Turn("user", "Say a number."), Turn("assistant", f"It is {number}.")))


def module_of(shards: Path) -> InstructionDataModule:
    settings = {"num_steps": NUM_SAMPLES // BATCH, "global_batch_size": BATCH, "micro_batch_size": BATCH}
    return InstructionDataModule([{"name": "made_up", "shards": str(shards)}], small_processor(), **settings)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_a_million_samples_start_at_once_resume_at_once_and_keep_memory_flat(tmp_path: Path) -> None:
    write_shards(records(), tmp_path / "shards", samples_per_shard=NUM_SAMPLES // 100)
    module_of(tmp_path / "shards").train_dataloader()  # imports and the page cache are no part of the start
    start = time.perf_counter()
    steps = iter(module_of(tmp_path / "shards").train_dataloader())
    first = next(steps)
    started = time.perf_counter() - start
    memory, keys, expected = {}, set(), ()
    for step in chain([first], steps):
        batch = step[0]
        keys.update(int(key[1:]) for key in batch.keys)
        if batch.position == RESUMED:
            expected = batch.keys
        if batch.position % 100_000 == 0:
            memory[batch.position] = resident_mib()
    memory[NUM_SAMPLES] = resident_mib()
    assert keys == set(range(NUM_SAMPLES))
    resumed = module_of(tmp_path / "shards")
    resumed.load_state_dict({**resumed.state_dict(), "samples_consumed": RESUMED})
    start = time.perf_counter()
    step = next(iter(resumed.train_dataloader()))
    ready = time.perf_counter() - start
    print(f"first step {started:.2f} s, step at {RESUMED} {ready:.2f} s, MiB by sample {memory}")
    assert (step[0].position, step[0].keys) == (RESUMED, expected)
    assert started < 5
    assert ready < 10
    assert memory[NUM_SAMPLES] < 1.05 * memory[400_000]
