"""Every loss that is timed is the same loss."""

from __future__ import annotations

from pathlib import Path

from moevlm.benchmarks.suites import run_suite


def test_contenders_that_run_on_a_cpu_agree_with_the_reference(tmp_path: Path) -> None:
    results = run_suite("losses", size="tiny", device="cpu", output=tmp_path, warmup=0, repeats=1)
    failed = [result for result in results if result.status != "ok"]
    assert all(result.contender.startswith("liger") for result in failed), failed
    checked = {(result.case, result.contender) for result in results if {"loss", "hidden"} <= set(result.errors)}
    for case in ("kd + ce", "kd + ce, frozen head", "ce", "reverse kl"):
        assert {(case, "ours"), (case, "supervised logits"), (case, "all logits")} <= checked
    assert any("head" in result.errors for result in results if result.case == "kd + ce")
    assert not any("head" in result.errors for result in results if result.case == "kd + ce, frozen head")
