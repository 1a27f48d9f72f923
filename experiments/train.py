"""Run one training stage: compose -> build -> fit, in a run folder that the same command resumes.

python -m experiments.train experiment=mini/moe_tuning
python -m experiments.train -m experiment=mini/moe_tuning model.moe.num_experts=2,4 model.moe.top_k=1,2
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import lightning
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig

from experiments.instantiate import build, plain
from experiments.launching import is_worker, launch, num_devices
from experiments.program import program
from experiments.run_folder import newest_checkpoint, open_run_folder, read_json, write_json
from experiments.trainer import build_trainer


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
        if num_devices(cfg.trainer) > 1:
            launch("experiments.train", overrides, run_folder, num_devices(cfg.trainer))
            return read_json(run_folder / "result.json")
    return fit(cfg, run_folder)


def fit(cfg: DictConfig, run_folder: Path) -> dict[str, Any]:
    """The part that every rank runs."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    stage, datamodule, trainer = build(cfg.stage), build(cfg.data), build_trainer(cfg, run_folder)
    timer = Timer()
    trainer.callbacks.append(timer)  # its elapsed time is part of every checkpoint
    checkpoint = newest_checkpoint(run_folder / "checkpoints")
    before = run_folder / "before.json"
    if checkpoint is None:
        validated = trainer.validate(stage, datamodule=datamodule, verbose=False)
        if trainer.is_global_zero:
            write_json(before, validated[0])
    elif trainer.is_global_zero:
        print(f"resuming {run_folder} from {checkpoint.name}")
    trainer.fit(stage, datamodule=datamodule, ckpt_path=checkpoint)
    validated = trainer.validate(stage, datamodule=datamodule, verbose=False)
    stage.save_model(run_folder / "model", datamodule.processor)
    result = {
        "status": "finished",
        "steps": trainer.global_step,
        "seconds": round(timer.time_elapsed("train"), 1),
        "loss_first": read_json(before)["val/loss"],
        "loss_last": validated[0]["val/loss"],
        "checkpoint": str(newest_checkpoint(run_folder / "checkpoints")),
        "model": str(run_folder / "model"),
    }
    if trainer.is_global_zero:
        write_json(run_folder / "result.json", result)
        print(f"finished {run_folder}: val/loss {result['loss_first']:.4f} -> {result['loss_last']:.4f}")
    return result


@hydra.main(version_base=None, config_path="../conf", config_name="train")
@program
def main(cfg: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    train(cfg, Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task))


if __name__ == "__main__":
    main()
