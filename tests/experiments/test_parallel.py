"""Jobs of chains in several processes: the same results as one after another, and a failure hides no other."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

from experiments.chain import check_chain, compose_stage, needs_of
from experiments.jobs import Job, chain_jobs, urgency
from experiments.parallel import ParallelRun
from experiments.pipeline import chains_of, run_pipeline
from experiments.run_folder import read_json
from experiments.workers import Worker, environments

COMMON = ["trainer=cpu", "micro_batch_size=2", "global_batch_size=2", "data.num_validation_samples=2", "logger=files"]
STAGES = [
    {"name": "alignment", "experiment": "mini/connector_alignment"},
    {"name": "blind", "experiment": "mini/blind"},
]
EVALUATE = [
    "~evaluate.folders",
    "~evaluate.random_routing",
    "evaluate.models=[alignment, blind]",
    "evaluate.compare=[[alignment, blind]]",
    "evaluate.limit={vqa: 4, pope: 2, descriptions: 1}",
]


def run(world: Path, root: Path, stages: list[dict[str, Any]], *more: str) -> None:
    given = [
        "pipeline=distillation_table",
        "name=chain/seed_${seed}",
        f"output_root={root}",
        f"data_root={world}",
        "world=null",
    ]
    listed = re.sub(r'"(\w+)": ', r"\1: ", json.dumps(stages))  # Hydra's grammar quotes no keys
    given += ["num_steps=2", f"common={json.dumps(COMMON)}", f"stages={listed}", *EVALUATE, *more]
    with initialize_config_module("conf", version_base=None):
        run_pipeline(compose("pipeline", given))


def settings_of(*overrides: str) -> dict[str, Any]:
    with initialize_config_module("conf", version_base=None):
        return chains_of(compose("pipeline", [*overrides]))[0]


@pytest.mark.slow  # the demo's chain at two steps, in test_pipeline.py, runs two jobs at a time by default
@pytest.mark.timeout(600)
def test_processes_side_by_side_leave_what_one_after_another_does(world: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        run(world, tmp_path / str(jobs), STAGES, "seeds=[0]", f"jobs={jobs}")
    alone, beside = (read_json(tmp_path / jobs / "chain/seed_0/summary.json") for jobs in "12")
    for one, other in zip(alone["stages"], beside["stages"], strict=True):
        assert (one["name"], one["steps"]) == (other["name"], other["steps"])
        assert other["loss_first"] == pytest.approx(one["loss_first"], rel=1e-5)
        assert other["loss_last"] == pytest.approx(one["loss_last"], rel=1e-5)
    assert beside["comparisons"] == alone["comparisons"]
    assert "finished" in (tmp_path / "2/chain/seed_0/blind/log.txt").read_text()
    assert "| alignment - blind |" in (tmp_path / "2/chain/table.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_that_fails_stops_only_what_starts_from_it(world: Path, tmp_path: Path) -> None:
    broken = {"name": "broken", "experiment": "mini/instruction_tuning", "overrides": ["optimizer.lr=-1.0"]}
    behind = {"name": "behind", "experiment": "mini/instruction_tuning", "start": "broken"}
    with pytest.raises(ValueError, match="4 jobs failed; the others are complete") as caught:
        run(world, tmp_path, [*STAGES, broken, behind], "seeds=[0,1]", "jobs=2")
    told = str(caught.value)
    assert "chain/seed_0/broken: " in told
    assert "seed_0/broken/log.txt" in told
    assert "chain/seed_1/behind: not run: chain/seed_1/broken failed" in told
    for seed in (0, 1):
        root = tmp_path / f"chain/seed_{seed}"
        assert read_json(root / "blind/result.json")["steps"] == 2
        assert read_json(root / "eval/blind/scores.json")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_dies_fails_its_job_alone(tmp_path: Path) -> None:
    job = Job("a", "stage", "a", {}, tmp_path / "a")
    worker = Worker({"OMP_NUM_THREADS": "1"})
    worker.give(job)
    assert worker.process.pid is not None
    os.kill(worker.process.pid, signal.SIGKILL)
    assert worker.answer() == (False, "its process ended with exit code -9")
    worker.stop()


def test_an_unknown_key_of_one_stage_leaves_the_next_one_composable() -> None:
    with initialize_config_module("conf", version_base=None):
        with pytest.raises(ValueError, match=r"unknown key optimizer\.lrr"):
            compose_stage("first", "train", ["experiment=mini/moe_tuning", "optimizer.lrr=1.0"])
        assert compose_stage("second", "train", ["experiment=mini/moe_tuning", "optimizer.lr=1.0"]).optimizer.lr == 1.0


def test_a_key_that_stands_for_another_is_refused_by_the_name_of_that() -> None:
    said = r"unknown key world\.num_train: world is \$\{miniature_world\} here"
    with initialize_config_module("conf", version_base=None), pytest.raises(ValueError, match=said):
        compose_stage("demo", "pipeline", ["pipeline=demo", "world.num_train=80"])


def test_several_models_are_evaluated_under_random_routing_too() -> None:
    asked = "evaluate.random_routing=[sft_sparse, d2s]"
    settings = settings_of("pipeline=distillation_table", asked)
    found = {job.target: job.needs for job in chain_jobs(settings) if job.target.endswith("_random_routing")}
    prefix = settings["name"]
    assert found == {f"{name}_random_routing": (f"{prefix}/{name}",) for name in ("sft_sparse", "d2s")}


def test_what_a_stage_needs_is_its_start_its_after_and_the_folders_it_names() -> None:
    table = settings_of("pipeline=distillation_table")
    stages = {stage["name"]: stage for stage in table["stages"]}
    assert needs_of(stages["offline"], table) == {"alignment", "cache"}
    assert needs_of(stages["d2s"], table) == {"d2d_start"}
    modular = settings_of("pipeline=modular")
    stages = {stage["name"]: stage for stage in modular["stages"]}
    assert needs_of(stages["ple"], modular) == {"captions", "instructions", "descriptions"}
    assert needs_of(stages["jeet"], modular) == {"base"}


def test_a_stage_after_a_later_one_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' runs after 'b', which is none of the stages before it"):
        check_chain([{"name": "a", "after": ["b"]}, {"name": "b"}])


def test_jobs_with_most_behind_them_go_first_and_evaluations_wait_for_their_model() -> None:
    jobs = chain_jobs(settings_of("pipeline=distillation_table"))
    behind = urgency(jobs)
    names = {job.name.removeprefix("distillation_table/seed_0/"): job for job in jobs}
    counts = {name: behind[job.name] for name, job in names.items()}
    assert (counts["alignment"], counts["d2d_start"], counts["d2s"], counts["sft"], counts["eval/sft"]) == (
        4,
        3,
        2,
        1,
        0,
    )
    assert names["eval/d2s"].needs == ("distillation_table/seed_0/d2s",)
    assert names["eval/teacher"].needs == ()
    waiting = ParallelRun(jobs, 1).waiting
    assert waiting[0] is names["alignment"]


def test_losses_by_domain_are_jobs_of_every_model_that_the_report_compares() -> None:
    jobs = {job.name for job in chain_jobs(settings_of("pipeline=modular")) if job.kind == "losses"}
    assert {name.rpartition("/")[2] for name in jobs} == {
        "base", "captions", "instructions", "descriptions", "then_instructions", "then_descriptions", "single_session",
        "ple", "ple_ffn", "jeet", "moe_ce",
    }  # fmt: skip


def test_seeds_that_would_share_a_folder_are_refused() -> None:
    with pytest.raises(ValueError, match="every seed needs a folder of its own"):
        settings_of("pipeline=llavadi", "seeds=[0,1]")
    with pytest.raises(ValueError, match="every seed needs a folder of its own"):
        settings_of("pipeline=modular", "seeds=[0,0]")


def test_workers_share_cores_and_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = environments(3)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["0", "1", "0"]
    assert {one["OMP_NUM_THREADS"] for one in found} == {"5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert environments(2)[1] == {"CUDA_VISIBLE_DEVICES": "GPU-b", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
