"""W&B after a kill: the rows that its client lost are logged again from the record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_modules.wandb_record import read_history

WRITE = """
import sys, time
from lightning.pytorch.loggers import WandbLogger
logger = WandbLogger(project="test", id="abc", offline=True, save_dir=sys.argv[1])
logger.log_metrics({"moe/load_map": 1.0}, step=149)
for step in range(150):
    logger.log_metrics({"train/loss": step / 7}, step=step)
print("written", flush=True)
time.sleep(60)
"""

# a process of its own, as a resumed run is: a W&B service that earlier tests left in this one writes when it likes
REFILL = """
import sys
from lightning.pytorch.loggers import WandbLogger
from lightning_modules.wandb_record import refill
rows = [{"step": step, "time": 0.0, "train/loss": step / 7} for step in range(150)]
rows += [{"step": 0, "time": 0.0, "val/loss": 3.0}]
logger = WandbLogger(project="test", id="abc", offline=True, save_dir=sys.argv[1])
print("refilled", refill(logger, rows), flush=True)
logger.experiment.finish()
"""


@pytest.mark.slow
def test_a_killed_run_is_refilled_without_repeats(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    # not this process's W&B service, which an earlier test may have started: it would outlive the kill and hold the run
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=own)
    assert process.stdout is not None
    while "written" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    command = [sys.executable, "-c", REFILL, str(tmp_path)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=own).stdout
    count = int(printed.split("refilled ")[1].split()[0])
    found = [row for piece in tmp_path.glob("wandb/offline-run-*/*.wandb") for row in read_history(piece)]
    steps = sorted(int(row["trainer/global_step"]) for row in found if "train/loss" in row)
    assert steps == list(range(150))
    assert 0 < count < 151  # some rows had reached the disk before the kill
    assert [row["val/loss"] for row in found if "val/loss" in row] == [3.0]
