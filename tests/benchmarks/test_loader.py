"""The loader's suite runs, and what it calls a batch is one."""

from pathlib import Path

import torch

from moevlm.benchmarks.loader import BATCH, PROBLEMS, TURNS, WAYS, Batches, make_processor, make_shards
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
