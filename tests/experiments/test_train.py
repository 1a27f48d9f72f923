"""The train program: run folders, resume, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback
from omegaconf import DictConfig, open_dict

from experiments.train import train
from moevlm.models.pretrained import load_pretrained

Run = Callable[..., dict[str, Any]]


class PowerCut(Callback):
    """Ends the process's work as abruptly as an exception can, before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def training_rows(folder: Path) -> list[dict[str, Any]]:
    """All that is logged of training steps but what the machine has to do with: times, rates, memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key != "time" and not key.startswith("perf/")} for row in rows]
    return [row for row in rows if "train/loss" in row]


def test_a_run_folder_explains_itself(run: Run, tmp_path: Path) -> None:
    result = run("run", "experiment=mini/connector_alignment")
    assert result["status"] == "finished"
    assert result["steps"] == 2
    assert json.loads((tmp_path / "run/environment.json").read_text())["packages"]["torch"]
    assert (tmp_path / "run/config.yaml").exists()
    assert Path(result["checkpoint"]).exists()
    assert load_pretrained(result["model"]).num_visual_tokens == 36


def test_the_same_command_says_that_a_finished_run_is_finished(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    first = run("run", "experiment=mini/connector_alignment")
    capsys.readouterr()
    assert run("run", "experiment=mini/connector_alignment") == first
    assert "is finished (2 steps); nothing to do" in capsys.readouterr().out


def test_another_config_in_the_same_folder_is_refused_with_a_diff(run: Run) -> None:
    run("run", "experiment=mini/connector_alignment")
    with pytest.raises(ValueError, match=r"(?s)another config.*-  lr: 0.002.*\+  lr: 0.5"):
        run("run", "experiment=mini/connector_alignment", "optimizer.lr=0.5")


def test_losses_after_an_interruption_are_those_of_an_unbroken_run(
    compose_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    overrides = ["experiment=mini/moe_tuning", "num_steps=5", "callbacks.checkpoint.every_n_steps=2"]
    train(compose_run(*overrides), tmp_path / "unbroken", [])
    interrupted = compose_run(*overrides)
    with open_dict(interrupted):
        interrupted.callbacks.cut = {"_target_": f"{__name__}.PowerCut", "step": 3}
    with pytest.raises(RuntimeError, match="power cut"):
        train(interrupted, tmp_path / "broken", [])
    (tmp_path / "broken/config.yaml").unlink()  # it names the power cut, which the resumed command does not have
    train(compose_run(*overrides), tmp_path / "broken", [])
    assert training_rows(tmp_path / "broken") == training_rows(tmp_path / "unbroken")


def test_a_checkpoint_of_another_model_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    run("blind", "experiment=mini/blind")
    with pytest.raises(ValueError, match="checkpoint of another model"):
        run("next", "experiment=mini/instruction_tuning", f"model.weights={tmp_path}/blind/model")


def test_two_runs_of_one_process_are_two_runs_in_wandb(run: Run, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        run(folder, "experiment=mini/connector_alignment", "logger=default")
        (tracked,) = (tmp_path / folder / "wandb").glob("offline-run-*")
        assert tracked.name.endswith((tmp_path / folder / "run_id").read_text())
