"""Keeps a run's identity in W&B with its checkpoints."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class RunIdentity(Callback):
    """Write the W&B run id and group into every checkpoint, and warn when a checkpoint goes on as another run.

    Lightning saves neither. A run folder keeps them too, and that is where a resumed run takes them from, because
    Lightning starts W&B before it reads a checkpoint; the checkpoint's copy stays when the folder is gone.
    """

    def __init__(self) -> None:
        self._identity: dict[str, Any] = {}

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._identity = {"id": logger.version, "group": logger._wandb_init.get("group")}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._identity)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._identity and state_dict and state_dict["id"] != self._identity["id"]:
            rank_zero_warn(
                f"this checkpoint was written by W&B run {state_dict['id']} of group {state_dict['group']}, and goes "
                f"on as {self._identity['id']}; set logger.wandb.id={state_dict['id']} to continue its curves"
            )
