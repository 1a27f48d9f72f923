"""Every way of decoding that is timed computes the same logits."""

from pathlib import Path

import torch

from moevlm.benchmarks.generation import PROBLEMS, SHAPES, Problem, draw_prompts, ours, random_vlm, step_bytes
from moevlm.benchmarks.suites import run_suite
from moevlm.evaluation.decoding import Session
from moevlm.evaluation.generation import generate_batch


def test_contenders_agree_with_the_cache_that_grows(tmp_path: Path) -> None:
    results = run_suite("generation", size="tiny", device="cpu", output=tmp_path, warmup=0, repeats=1)
    assert all(result.status == "ok" for result in results), [result.why for result in results if result.why]
    checked = {result.contender for result in results if result.errors}
    ours = {f"ours, {way}" for way in ("fused", "graph", "eager", "dynamic")}
    assert checked == ours | {"transformers generate"}
    assert {result.case for result in results} == {problem.name for problem in PROBLEMS["tiny"]}


def test_steps_alone_take_the_tokens_of_a_whole_answer() -> None:
    shape, problem = SHAPES["tiny"], Problem("steps", 1, 7, 5, steps_alone=True)
    vlm = random_vlm(shape, torch.device("cpu"), torch.float32)
    prompts = draw_prompts(problem, shape)
    session = Session(vlm, "fused", batch_size=1, max_length=12, view="default")
    answer = generate_batch(session, prompts, 5, torch.empty(0, dtype=torch.int64))[0]
    work = ours(vlm, prompts, problem, "fused")
    for _ in range(2):
        following = work.step().argmax().item()
        longer = generate_batch(
            Session(vlm, "fused", batch_size=1, max_length=13, view="default"), prompts, 6, torch.empty(0).long()
        )[0]
        assert longer == [*answer, following]


def test_the_floor_counts_a_tokens_own_experts_and_with_many_tokens_all() -> None:
    shape = SHAPES["tiny"]
    vlm = random_vlm(shape, torch.device("cpu"), torch.float32)
    weights = sum(parameter.numel() for layer in vlm.decoder_blocks for parameter in layer.parameters())
    weights += vlm.head.weight.numel()
    expert = 3 * shape.width * shape.inner
    assert step_bytes(vlm, shape, Problem("one", 1, 0, 0)) == 4 * (weights - 2 * expert)
    assert abs(step_bytes(vlm, shape, Problem("many", 60, 0, 0)) - 4 * weights) < 1
