"""The Trainer of a run: callbacks, loggers and folders joined."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from lightning import Trainer
from omegaconf import DictConfig

from experiments.instantiate import build


def build_trainer(cfg: DictConfig, run_folder: Path) -> Trainer:
    """Build the trainer with every callback and logger of the config that is not null."""
    callbacks = [build(node) for node in cfg.callbacks.values() if node is not None]
    loggers = [build(node, **_identity(name, cfg, run_folder)) for name, node in cfg.logger.items() if node is not None]
    trainer = build(cfg.trainer, callbacks=callbacks, logger=loggers, default_root_dir=str(run_folder))
    assert isinstance(trainer, Trainer)
    return trainer


def run_id(run_folder: Path) -> str:
    """The run's identity in W&B, kept in the run folder so that a resumed run is the same run."""
    stored = run_folder / "run_id"
    if not stored.exists():
        temporary = run_folder / f".run_id.{os.getpid()}.tmp"
        temporary.write_text(uuid.uuid4().hex[:8])
        if not stored.exists():
            temporary.replace(stored)
        temporary.unlink(missing_ok=True)
    return stored.read_text()


def _identity(name: str, cfg: DictConfig, run_folder: Path) -> dict[str, Any]:
    if name != "wandb":
        return {}
    return {"id": run_id(run_folder), "name": cfg.run_name, "group": cfg.group or cfg.run_name}
