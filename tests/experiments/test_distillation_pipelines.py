"""Every ready stage graph of distillation, two steps a stage, in a world of a few scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from experiments.chain import check_chain
from experiments.pipeline import run_pipeline

COMMON = ["trainer=cpu", "micro_batch_size=2", "global_batch_size=4", "data.num_validation_samples=4", "logger=files"]
OF_PROGRAMS = [
    "limit=6",
    "device=cpu",
    "sampling.max_new_tokens=6",
    "sampling.temperature=2.0",
    "max_rejected_fraction=1.0",
]


def run(name: str, world: Path, root: Path, *more: str, common: list[str] = COMMON) -> dict[str, Any]:
    given = [f"common={json.dumps(common)}", f"common_of_programs={json.dumps(OF_PROGRAMS)}"]
    overrides = [f"pipeline={name}", f"output_root={root}", f"data_root={world}", "world=null", "evaluate=null"]
    with initialize_config_module("conf", version_base=None):
        return run_pipeline(compose("pipeline", [*overrides, "num_steps=2", *given, *more]))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("llava_kd", "llava_mod")), "llavadi"]
)
def test_published_stage_graphs_run(name: str, world: Path, tmp_path: Path) -> None:
    summary = run(name, world, tmp_path)
    assert [stage["steps"] for stage in summary["stages"]] == [2] * len(summary["stages"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_table_runs_online_and_from_caches(world: Path, tmp_path: Path) -> None:
    summary = run("distillation_table", world, tmp_path, "seed=1")
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert {"sft_sparse", "d2s", "preference_teacher", "adaptive_trend", "online", "offline_sampled"} <= set(stages)
    assert summary["programs"]["cache"]["num_caches"] == 3
    assert (tmp_path / "distillation_table/seed_1/d2d/config.yaml").read_text().count("seed: 1")
    assert stages["offline"]["loss_last"] == pytest.approx(stages["online"]["loss_last"], rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_generated_answers_and_fresh_pairs_feed_later_stages(world: Path, tmp_path: Path) -> None:
    summary = run("on_policy", world, tmp_path)
    programs = summary["programs"]
    assert {name: programs[name]["program"] for name in programs} == {
        "answers": "generate_answers", "pairs_1": "build_pairs", "pairs_2": "build_pairs",
    }  # fmt: skip
    assert all(program["num_samples"] > 0 for program in programs.values())
    again = run("on_policy", world, tmp_path)
    assert again["programs"] == json.loads(json.dumps(programs))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_modular_students_are_merged_trained_and_compared_by_domain(world: Path, tmp_path: Path) -> None:
    threes = [*COMMON, "micro_batch_size=3", "global_batch_size=6"]
    summary = run("modular", world, tmp_path, "forgetting.limit=4", common=threes)
    report = summary["forgetting"]
    assert {"captions", "then_descriptions", "ple", "ple_ffn", "jeet", "moe_ce"} <= set(report)
    for rows in report.values():
        assert set(rows) == {"captions", "instructions", "descriptions"}
        for row in rows.values():
            assert row["change"] == pytest.approx(row["after"] - row["before"])
    assert report["then_instructions"]["captions"]["before"] == report["captions"]["captions"]["after"]


def test_an_unknown_program_is_refused() -> None:
    with pytest.raises(ValueError, match="has program 'guess'; known: train, cache_teacher"):
        check_chain([{"name": "a", "program": "guess"}])
