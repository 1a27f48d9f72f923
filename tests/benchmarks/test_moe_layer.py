"""Every MoE layer that is timed computes the same, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moevlm.benchmarks.moe_layer import PROBLEMS, draw
from moevlm.benchmarks.suites import run_suite
from moevlm.ops.routing import top_k_routing

NEED_A_GPU_OR_AN_INSTALLATION = {"liger", "scattermoe"}


def test_contenders_that_run_on_a_cpu_agree_with_the_reference(tmp_path: Path) -> None:
    results = run_suite("moe_layer", size="tiny", device="cpu", output=tmp_path, warmup=0, repeats=1)
    failed = [result for result in results if result.status != "ok"]
    failed = [result for result in failed if "CUDA graph" not in result.contender]
    assert {result.contender for result in failed} <= NEED_A_GPU_OR_AN_INSTALLATION, failed
    checked = [result for result in results if result.errors]
    assert len({result.contender for result in checked}) >= 4
    trained = [result for result in checked if not result.case.startswith("decode")]
    assert {"output", "gate", "up", "down"} == set.intersection(*(set(result.errors) for result in trained))
    assert {"hidden", "router"} <= set.union(*(set(result.errors) for result in checked))


@pytest.mark.parametrize(("top_k", "share"), [(2, None), (2, 0.6), (1, 0.6)])
def test_drawn_tokens_are_routed_as_the_problem_says(top_k: int, share: float | None) -> None:
    problem = PROBLEMS["tiny"][0].__class__("p", 4000, width=16, inner=8, top_k=top_k, first_share=share)
    weights, hidden_TD, _ = draw(problem, torch.device("cpu"), torch.float32)
    ids_TK = top_k_routing(hidden_TD @ weights.router.T, top_k=top_k).expert_ids
    expected = 0.25 if share is None else share + (1 - share) / 4
    assert (ids_TK[:, 0] == 0).float().mean().item() == pytest.approx(expected, abs=0.03)
