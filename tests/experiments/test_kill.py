"""A run whose process is killed goes on with the same command, and ends as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.run_folder import newest_checkpoint, read_json
from lightning_modules.loggers import read_rows
from tests.experiments.conftest import TINY_RUN
from tests.experiments.test_train import training_rows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 40


def start(folder: Path, world: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.train", "experiment=mini/moe_tuning", *TINY_RUN]
    command += [f"num_steps={NUM_STEPS}", "callbacks.checkpoint.every_n_steps=4", f"data_root={world}"]
    command += [f"output_root={folder.parent}", f"run_name={folder.name}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def test_a_killed_run_resumes_to_the_losses_of_an_unbroken_one(world: Path, tmp_path: Path) -> None:
    finish(start(tmp_path / "unbroken", world))
    broken = tmp_path / "broken"
    killed = start(broken, world)
    try:
        while killed.poll() is None and _num_steps_logged(broken) < 11:
            time.sleep(0.005)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    before = newest_checkpoint(broken / "checkpoints")
    assert before is not None
    assert f"resuming {broken} from {before.name}" in finish(start(broken, world))
    assert training_rows(broken) == training_rows(tmp_path / "unbroken")
    assert [row["step"] for row in training_rows(broken)] == list(range(NUM_STEPS))
    results = [read_json(tmp_path / name / "result.json") for name in ("broken", "unbroken")]
    assert results[0]["loss_last"] == results[1]["loss_last"]
    assert "is finished (40 steps); nothing to do" in finish(start(broken, world))


def _num_steps_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return sum("train/loss" in row for row in read_rows(path)) if path.exists() else 0
