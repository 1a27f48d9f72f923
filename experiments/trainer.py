"""The Trainer of a run: callbacks, loggers and folders joined; and its fit between two validations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig
from transformers import AutoTokenizer

from datamodules.teacher_view import check_same_ids
from experiments.instantiate import build
from experiments.run_folder import newest_checkpoint, read_json, write_json
from experiments.tracking import identity
from lightning_modules.callbacks.throughput_monitor import peak_memory_gib, restart_peak_memory
from lightning_modules.checkpoint_files import read_manifest, step_of
from lightning_modules.checkpoint_io import FolderCheckpointIO
from lightning_modules.loggers import JsonlLogger


def fit(cfg: DictConfig, run_folder: Path) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start; what every rank of a run does.

    Returns:
        The content of ``result.json``: status, steps, seconds, peak_memory_gib, loss_first, loss_last, checkpoint,
        model.
    """
    restart_peak_memory()  # of this run, not of one before it in this process
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    timer = Timer()  # its elapsed time is part of every checkpoint
    stage, datamodule, trainer = build(cfg.stage), build(cfg.data), build_trainer(cfg, run_folder, timer)
    datamodule.trainer = trainer
    _check_teacher_tokenizer(cfg, datamodule)
    datamodule.setup("fit")  # before Lightning opens the loggers: bad data must leave no run in W&B
    checkpoint = newest_checkpoint(run_folder / "checkpoints")
    before = run_folder / "before.json"
    _rewind_records(trainer, checkpoint)
    if checkpoint is None:
        validated = trainer.validate(stage, datamodule=datamodule, verbose=False)
        if trainer.is_global_zero:
            write_json(before, validated[0])
    elif trainer.is_global_zero:
        print(f"resuming {run_folder} from {checkpoint.name}{_split_note(checkpoint, trainer.world_size)}")
    trainer.fit(stage, datamodule=datamodule, ckpt_path=checkpoint)
    validated = trainer.validate(stage, datamodule=datamodule, verbose=False)
    stage.save_model(run_folder / "model", datamodule.processor)
    result = {
        "status": "finished",
        "steps": trainer.global_step,
        "seconds": round(timer.time_elapsed("train"), 1),
        "peak_memory_gib": round(peak_memory_gib(trainer.strategy.root_device), 3),
        "loss_first": read_json(before)["val/loss"],
        "loss_last": validated[0]["val/loss"],
        "checkpoint": str(newest_checkpoint(run_folder / "checkpoints")),
        "model": str(run_folder / "model"),
    }
    if trainer.is_global_zero:
        write_json(run_folder / "result.json", result)
        print(f"finished {run_folder}: val/loss {result['loss_first']:.4f} -> {result['loss_last']:.4f}")
    return result


def build_trainer(cfg: DictConfig, run_folder: Path, *more_callbacks: Callback) -> Trainer:
    """Build the trainer with every callback and logger of the config that is not null."""
    callbacks = [build(node) for node in cfg.callbacks.values() if node is not None] + list(more_callbacks)
    loggers = [build(node, **identity(name, cfg, run_folder)) for name, node in cfg.logger.items() if node is not None]
    paths = {"default_root_dir": str(run_folder)}
    trainer = build(cfg.trainer, callbacks=callbacks, logger=loggers, plugins=[FolderCheckpointIO()], **paths)
    assert isinstance(trainer, Trainer)
    return trainer


def _check_teacher_tokenizer(cfg: DictConfig, datamodule: Any) -> None:
    """Where the teacher's folder holds its tokenizer, refuse one that is not the student's, before anything runs."""
    folder = cfg.teacher.get("folder") or cfg.teacher.get("weights")
    is_taught = cfg.stage.get("build_teacher") is not None and cfg.data.get("teacher_processor") is None
    if is_taught and folder and (Path(folder) / "tokenizer.json").is_file():
        check_same_ids(datamodule.processor.tokenizer, AutoTokenizer.from_pretrained(folder))


def _rewind_records(trainer: Trainer, checkpoint: Path | None) -> None:
    """Drop what the record holds behind the point from which the run goes on."""
    for logger in trainer.loggers:
        if isinstance(logger, JsonlLogger):
            logger.drop_rows_after(-1 if checkpoint is None else step_of(checkpoint))


def _split_note(checkpoint: Path, world_size: int) -> str:
    before = read_manifest(checkpoint).get("world_size", world_size)
    if before == world_size:
        return ""
    return (
        f" (written by {before} ranks, goes on with {world_size}: every step takes the same samples, none is lost or "
        "repeated; losses agree to rounding, dropout draws differ)"
    )
