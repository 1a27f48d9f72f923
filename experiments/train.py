"""Run one training stage: compose -> build -> fit, in a run folder that the same command resumes.

python -m experiments.train experiment=mini/moe_tuning
python -m experiments.train -m experiment=mini/moe_tuning model.moe.num_experts=2,4 model.moe.top_k=1,2
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.cache_teacher import leave_missing_references, prepare_references
from experiments.instantiate import plain
from experiments.launching import end_with_parent, is_worker, launch, num_devices
from experiments.program import program
from experiments.run_folder import open_run_folder, prepare_resume, read_json, sole_writer
from experiments.tracking import end_tracking
from experiments.trainer import fit


def train(cfg: DictConfig, run_folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train, or resume, or say that there is nothing left to do.

    Args:
        cfg: the composed config of ``conf/train.yaml``.
        run_folder: where everything of this run is written.
        overrides: the command's own overrides, for the worker processes of a run on several devices.

    Returns:
        The content of ``result.json``: status, steps, seconds, loss_first, loss_last, checkpoint, model.
    """
    cfg.run_dir = str(run_folder)
    if not is_worker():
        result = open_run_folder(run_folder, plain(cfg))
        if result.get("status") == "finished":
            print(f"{run_folder} is finished ({result['steps']} steps); nothing to do")
            return result
        prepare_references(cfg)
        with sole_writer(run_folder):
            prepare_resume(run_folder / "checkpoints")
        if num_devices(cfg.trainer) > 1:
            launch("experiments.train", overrides, run_folder, num_devices(cfg.trainer))
            return read_json(run_folder / "result.json")
    else:
        end_with_parent()
    leave_missing_references(cfg)
    try:
        with sole_writer(run_folder) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
            return fit(cfg, run_folder)
    finally:
        end_tracking()


@program("train")
def main(cfg: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    run_folder = Path(hydra_config.runtime.output_dir)
    if run_folder.is_relative_to(Path.cwd()):
        run_folder = run_folder.relative_to(Path.cwd())  # what a run writes should not name this machine's folders
    train(cfg, run_folder, list(hydra_config.overrides.task))


if __name__ == "__main__":
    main()
