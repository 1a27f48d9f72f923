"""Measures speed and memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from moevlm.batch import VLMBatch
from moevlm.models.counting import training_flops
from moevlm.models.vlm import VLM


class ThroughputMonitor(Callback):
    """Log tokens and samples a second, peak memory, waiting for data; on request MFU.

    ``perf/tokens_per_second``, ``perf/samples_per_second``, ``perf/peak_memory_gib``, ``perf/data_wait_fraction``,
    ``perf/mfu``.

    Tokens are those the student's decoder sees, visual tokens included; tokens and samples are those of all ranks, over
    the last `every_n_steps` steps. The clock includes waiting for data and excludes validation. Memory is the peak on
    this rank's GPU since the start, or of the process on a CPU. MFU are the model's FLOPs of this rank's micro-batches
    (`moevlm.models.counting.training_flops`) over what `ceiling_tflops` gives in that time, a teacher's left out.
    The waiting is the share of that time in which this rank's main process asked the loader for a step; a GPU that has
    work queued may notice nothing of it. Data whose loader does not count it logs none.
    """

    def __init__(self, every_n_steps: int = 10, ceiling_tflops: float | None = None) -> None:
        """Keep the settings.

        Args:
            every_n_steps: steps of one value.
            ceiling_tflops: TFLOP/s of the device's matrix products, measured (``experiments.benchmark`` prints it) or
                promised; None logs no MFU.
        """
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps must be at least 1, got {every_n_steps}; set callbacks.throughput.every_n_steps"
            )
        if ceiling_tflops is not None and not ceiling_tflops > 0:
            raise ValueError(
                f"ceiling_tflops must be positive, or null for no MFU, got {ceiling_tflops}; "
                "set callbacks.throughput.ceiling_tflops"
            )
        self.every_n_steps, self.ceiling_tflops = every_n_steps, ceiling_tflops
        self._since, self._seconds = 0.0, 0.0
        self._num_steps, self._num_tokens, self._num_samples, self._flop = 0, 0.0, 0.0, 0.0
        self._waited = 0.0  # of the loader, when the present value began

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._reset()
        self._since = time.perf_counter()
        self._waited = waited_seconds(trainer) or 0.0

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
        if self.ceiling_tflops is not None and type(pl_module.model) is VLM:  # a modular one runs other decoders
            self._flop += sum(_flop(pl_module.model, one) for one in (batch if isinstance(batch, list) else [batch]))
        if self._num_steps < self.every_n_steps:
            return
        values = {
            "perf/tokens_per_second": self._num_tokens / self._seconds,
            "perf/samples_per_second": self._num_samples / self._seconds,
            "perf/peak_memory_gib": peak_memory_gib(pl_module.device),
        }
        waited = waited_seconds(trainer)
        if waited is not None:
            values["perf/data_wait_fraction"] = (waited - self._waited) / self._seconds
            self._waited = waited
        if self._flop and self.ceiling_tflops is not None:
            values["perf/mfu"] = self._flop / self._seconds / (self.ceiling_tflops * 1e12)
        pl_module.log_dict(values, on_step=True, on_epoch=False, rank_zero_only=True)
        self._reset()

    def _reset(self) -> None:
        self._seconds, self._num_steps = 0.0, 0
        self._num_tokens, self._num_samples, self._flop = 0.0, 0.0, 0.0


def waited_seconds(trainer: lightning.Trainer) -> float | None:
    """What the training loader has been waited for since it was made; None where nothing counts that."""
    return getattr(getattr(getattr(trainer, "datamodule", None), "train_loader", None), "waited_seconds", None)


def _flop(model: VLM, batch: VLMBatch) -> float:
    lengths = model.sequence_lengths(batch)
    return training_flops(model, lengths, num_targets=batch.num_targets, num_images=batch.num_images)


def restart_peak_memory() -> None:
    """Let the peak on GPUs count from here; what a process had resident at most cannot be forgotten."""
    if torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory allocated on a GPU, or resident in this process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
