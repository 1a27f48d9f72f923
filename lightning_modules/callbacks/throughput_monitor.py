"""Measures speed and memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback


class ThroughputMonitor(Callback):
    """Log ``perf/tokens_per_second``, ``perf/samples_per_second`` and ``perf/peak_memory_gib``.

    Tokens are those the student's decoder sees, visual tokens included; tokens and samples are those of all ranks, over
    the last `every_n_steps` steps. The clock includes waiting for data and excludes validation. Memory is the peak on
    this rank's GPU since the start, or of the process on a CPU.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps must be at least 1, got {every_n_steps}; set callbacks.throughput.every_n_steps"
            )
        self.every_n_steps = every_n_steps
        self._since, self._seconds = 0.0, 0.0
        self._num_steps, self._num_tokens, self._num_samples = 0, 0.0, 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._reset()
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        self._num_steps += 1
        self._num_tokens += outputs["counts"]["tokens"]
        self._num_samples += outputs["counts"]["sequences"]
        if self._num_steps < self.every_n_steps:
            return
        values = {
            "perf/tokens_per_second": self._num_tokens / self._seconds,
            "perf/samples_per_second": self._num_samples / self._seconds,
            "perf/peak_memory_gib": peak_memory_gib(pl_module.device),
        }
        pl_module.log_dict(values, on_step=True, on_epoch=False, rank_zero_only=True)
        self._reset()

    def _reset(self) -> None:
        self._seconds, self._num_steps = 0.0, 0
        self._num_tokens, self._num_samples = 0.0, 0.0


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory allocated on a GPU, or resident in this process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
