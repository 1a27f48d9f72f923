"""Checkpoints to resume from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint


class StepCheckpoint(ModelCheckpoint):
    """Save ``step_000100.ckpt`` every `every_n_steps` optimizer steps and after the last one; keep the newest `keep`.

    Lightning's own callback, in manual optimization, warns at each save that the weights are those after the step (they
    should be), and saves nothing when a run ends between two multiples. Names appear when the content is complete.
    """

    def __init__(self, dirpath: str | Path, every_n_steps: int = 100, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps must be at least 1, got {every_n_steps}; set callbacks.checkpoint.every_n_steps"
            )
        if keep < -1 or keep == 0:
            raise ValueError(f"keep must be positive, or -1 for all, got {keep}; set callbacks.checkpoint.keep")
        super().__init__(
            dirpath=dirpath,
            filename="step_{step:06d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
        )
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_due = trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps
        if is_due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
