"""Several devices: one fresh process group for each run, started by torchrun; the starting process never trains.

Lightning's own launcher re-runs the command line of its parent. Under Hydra's multirun that is the whole sweep, so the
ranks of one trial would each run a sweep of their own. Here the parent opens the run folder, hands every rank the
overrides of this one run, and waits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def is_worker() -> bool:
    """Whether this process is a rank that `launch` (or torchrun) started."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def num_devices(trainer: Any) -> int:
    """Devices that the trainer config asks for on this node; ``auto`` means every GPU, or one CPU process."""
    devices = trainer.get("devices", 1)
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if trainer.get("accelerator") != "cpu" else 1
    if isinstance(devices, int):
        return devices
    raise ValueError(f"trainer.devices must be a number or 'auto', got {devices!r}; set trainer.devices")


def launch(module: str, overrides: Sequence[str], run_folder: Path, devices: int) -> None:
    """Run ``python -m module`` on `devices` ranks and wait.

    Raises:
        ValueError: a rank failed; its own message stands above.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={devices}",
        "-m",
        module,
    ]
    command += [*overrides, f"hydra.run.dir={run_folder}", "hydra.mode=RUN"]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise ValueError(f"a rank of {run_folder} ended with exit code {code}; see its message above")
