"""Every way of decoding that is timed computes the same logits."""

from pathlib import Path

import torch

from moevlm.benchmarks.generation import PROBLEMS, SHAPES, Problem, random_vlm, step_bytes
from moevlm.benchmarks.suites import run_suite


def test_contenders_agree_with_the_cache_that_grows(tmp_path: Path) -> None:
    results = run_suite("generation", size="tiny", device="cpu", output=tmp_path, warmup=0, repeats=1)
    assert all(result.status == "ok" for result in results), [result.why for result in results if result.why]
    checked = {result.contender for result in results if result.errors}
    assert checked == {f"ours, {way}" for way in ("fused", "graph", "eager", "dynamic")} | {"transformers generate"}
    assert {result.case for result in results} == {problem.name for problem in PROBLEMS["tiny"]}


def test_the_floor_counts_a_tokens_own_experts_and_with_many_tokens_all() -> None:
    shape = SHAPES["tiny"]
    vlm = random_vlm(shape, torch.device("cpu"), torch.float32)
    weights = sum(parameter.numel() for layer in vlm.decoder_blocks for parameter in layer.parameters())
    weights += vlm.head.weight.numel()
    expert = 3 * shape.width * shape.inner
    assert step_bytes(vlm, shape, Problem("one", 1, 0, 0)) == 4 * (weights - 2 * expert)
    assert abs(step_bytes(vlm, shape, Problem("many", 60, 0, 0)) - 4 * weights) < 1
