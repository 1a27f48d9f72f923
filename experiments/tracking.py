"""Who a run is in W&B, and what is shown there once it has ended."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.instantiate import build


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


def identity(name: str, cfg: DictConfig, run_folder: Path) -> dict[str, Any]:
    """Arguments of the logger `name` that say which run it writes; none for loggers other than W&B."""
    if name != "wandb":
        return {}
    folder, root = run_folder.resolve(), Path(cfg.output_root).resolve()  # a trial of a sweep: run_name/what varies
    title = str(folder.relative_to(root)) if folder.is_relative_to(root) else cfg.run_name
    return {"id": run_id(run_folder), "name": title, "group": cfg.group or cfg.run_name}


def show_figures(run_folder: Path, figures: Sequence[Path]) -> bool:
    """Add figures to a trained run in W&B, each as ``figures/<its file's name>``; whether the run is tracked there.

    The run's own config decides: its ``logger.wandb`` says offline or online, and null that there is nothing to do.
    """
    stored = run_folder / "config.yaml"
    cfg = OmegaConf.load(stored) if stored.exists() else OmegaConf.create()
    node = OmegaConf.select(cfg, "logger.wandb")
    if node is None:
        return False
    assert isinstance(cfg, DictConfig)
    logger = build(node, **identity("wandb", cfg, run_folder), save_dir=str(run_folder))
    for figure in figures:
        logger.log_image(f"figures/{figure.stem}", [str(figure)])
    end_tracking()
    return True


def end_tracking() -> None:
    """End the run in W&B, whose client would otherwise add the next run of this process (a trial, a stage) to it."""
    wandb = sys.modules.get("wandb")  # imported when it is used, and not by us
    if wandb is not None and wandb.run is not None:
        wandb.finish()
