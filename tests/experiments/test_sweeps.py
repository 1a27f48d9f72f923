"""Sweeps: one folder and one W&B group, and a failing trial hides no other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.run_folder import read_json
from experiments.sweeps import shared_keys
from lightning_modules.checkpoint_io import FolderCheckpointIO
from tests.experiments.conftest import TINY_RUN

Sweep = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sweep(world: Path, tmp_path: Path) -> Sweep:
    """Run a sweep of ``mini/moe_tuning`` as a person does."""

    def swept(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "experiments.train", "-m", "experiment=mini/moe_tuning", *TINY_RUN]
        command += [f"data_root={world}", f"output_root={tmp_path}", *overrides]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    return swept


def test_what_all_trials_share_names_no_folder() -> None:
    overrides = ["experiment=mini/moe_tuning", "model.moe.top_k=1,2", "trainer=cpu", "+data.reader=indexed", "seed=1"]
    assert shared_keys(overrides) == ["data.reader", "experiment", "seed", "trainer"]
    assert shared_keys(["seed=range(3)", "model.moe.placement=[0,1]"]) == ["experiment", "model.moe.placement"]


def test_experiments_that_vary_name_folders_only_under_a_common_run_name() -> None:
    assert shared_keys(["experiment=mini/a,mini/b"]) == ["experiment"]
    assert shared_keys(["experiment=mini/a,mini/b", "run_name=both"]) == ["run_name"]


@pytest.mark.slow
def test_each_trial_has_a_folder_and_a_result_and_all_share_a_group(sweep: Sweep, tmp_path: Path) -> None:
    done = sweep("model.moe.num_experts=2,4", "model.moe.top_k=1,2", "logger=default")
    assert done.returncode == 0, done.stderr
    identities = set()
    for name in [f"model.moe.num_experts={experts},model.moe.top_k={k}" for experts in (2, 4) for k in (1, 2)]:
        folder = tmp_path / "mini/moe_tuning" / name
        result = read_json(folder / "result.json")
        assert (result["status"], result["steps"]) == ("finished", 2)
        saved = FolderCheckpointIO().load_checkpoint(result["checkpoint"])["callbacks"]["RunIdentity"]
        assert saved["group"] == "mini/moe_tuning"
        assert list((folder / "wandb").glob(f"offline-run-*-{saved['id']}"))
        identities.add(saved["id"])
    assert len(identities) == 4


@pytest.mark.slow
def test_an_impossible_trial_hides_no_other(sweep: Sweep, tmp_path: Path) -> None:
    done = sweep("model.moe.num_experts=2,4", "model.moe.top_k=3")
    assert done.returncode == 1
    assert read_json(tmp_path / "mini/moe_tuning/model.moe.num_experts=4/result.json")["status"] == "finished"
    assert not (tmp_path / "mini/moe_tuning/model.moe.num_experts=2/result.json").exists()
    fault = "top_k must lie in [1, num_experts=2], got 3; set model.moe.top_k"
    assert f"error: {fault}" in done.stderr
    assert f"failed trials: 1; the others are complete\n  model.moe.num_experts=2: {fault}\n" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_same_sweep_again_passes_over_finished_trials(sweep: Sweep) -> None:
    assert sweep("seed=0,1").returncode == 0
    assert sweep("seed=0,1").stdout.count("is finished (2 steps); nothing to do") == 2
