"""The loader's suite runs, and what it calls a batch is one."""

from pathlib import Path

import pytest
import torch

from moevlm.benchmarks.loader import (
    BATCH,
    PROBLEMS,
    SAMPLES_A_SECOND,
    TURNS,
    WAYS,
    Batches,
    Problem,
    make_processor,
    make_shards,
    report,
    waiting_share,
)
from moevlm.benchmarks.suites import run_suite


def test_every_way_is_timed_beside_decoding_and_resizing_alone(tmp_path: Path) -> None:
    results = run_suite("loader", size="tiny", device="cpu", output=tmp_path, warmup=0, repeats=1)
    assert all(result.status == "ok" for result in results), [result.why for result in results if result.why]
    assert {result.contender for result in results} == {"decode and resize", "loader", "1 workers"}
    assert all(result.rates["image"] > 0 for result in results)


def test_a_batch_is_whole_samples_with_their_levels(tmp_path: Path) -> None:
    problem = PROBLEMS["tiny"][0]
    for options in WAYS.values():
        batch = Batches(make_shards(problem, tmp_path), make_processor(problem, options), 9)[5]
        assert batch.num_sequences == batch.num_images == BATCH
        assert batch.num_targets > BATCH * len(TURNS[1].text.split())
        assert batch.images["default"].dtype == torch.uint8
        assert float(batch.view("default").abs().max()) <= 1.0


def test_scaling_and_waiting_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    report("tiny", rounds=2, seconds=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "decode + resize" in line]) == len(WAYS)
    assert [line for line in lines if line.startswith(" 1 workers on ") and line.endswith("1.00 times one")]
    assert len([line for line in lines if "% of the time for data" in line]) == len(SAMPLES_A_SECOND)


def test_a_consumer_faster_than_its_worker_waits_and_a_slow_one_does_not() -> None:
    problem = Problem("600 x 448", 600, 448, num_samples=8)
    fast = waiting_share(problem, num_workers=1, step_seconds=0.0, steps=12)
    slow = waiting_share(problem, num_workers=1, step_seconds=0.3, steps=4)
    assert fast.data > 0.5 > 0.2 > slow.data
