"""FSDP2 for the stages: Lightning's `ModelParallelStrategy`, with one mesh dimension and atomic checkpoints."""

from __future__ import annotations

import re
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor


class ShardedStrategy(ModelParallelStrategy):
    """Shard parameters, gradients and optimizer states over all ranks (FSDP2).

    A stage does the sharding itself, in `configure_model`. Lightning's defaults would take the GPUs of a node as tensor
    parallel; here all ranks are data parallel. Lightning's `FSDPStrategy` (FSDP1) is not offered: losses here use the
    head's weights after the forward pass, which FSDP1 does not allow.
    """

    def __init__(
        self,
        *,
        param_dtype: str | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout_seconds: float = 1800,
    ) -> None:
        """Keep the settings.

        Args:
            param_dtype: dtype of computation and all-gathers, "bfloat16" for example; master weights stay as they are,
                gradients are reduced in float32. Use it with ``trainer.precision=32-true``; None computes as stored.
            save_distributed_checkpoint: a folder with a file per rank; False gathers one file on the first rank.
            process_group_backend: None chooses by device; "gloo" on CPUs.
            timeout_seconds: of a collective.
        """
        super().__init__(
            data_parallel_size=1,  # set in setup_environment, when the number of ranks is known
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_seconds),
        )
        self.param_dtype = param_dtype

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as Lightning does, then check that no trainable parameter was left out of the sharding.

        Raises:
            ValueError: a trainable parameter is no DTensor: its gradient would never be exchanged, and ranks would
                drift apart without an error.
        """
        super().setup(trainer)
        assert self.lightning_module is not None
        for name, parameter in self.lightning_module.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                raise ValueError(
                    f"parameter {name} trains but is not sharded; shard it in configure_model, or freeze it"
                )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write to a hidden neighbour and rename: what has a checkpoint's name is complete, from one step.

        Lightning writes a folder's shards in place; a run killed then leaves a mix of steps that loads without an
        error.
        """
        path = Path(self.broadcast(str(filepath)))
        temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
        if self.global_rank == 0:
            _remove(temporary)
        self.barrier()
        super().save_checkpoint(checkpoint, temporary, storage_options)
        self.barrier()
        if self.global_rank == 0:
            _remove(old)
            if path.exists():
                path.replace(old)  # a folder cannot be replaced by a folder in one step
            temporary.replace(path)
            _remove(old)
        self.barrier()


def consolidate(folder: str | Path) -> dict[str, Any]:
    """Read a sharded checkpoint folder, in one process, as the dict that a single-file checkpoint holds.

    Lightning's own consolidation program fails on FSDP2 folders (KeyError 'model', lightning 2.6.6). Saved with
    `torch.save`, the result resumes under FSDP2, DDP and on one device; ``["state_dict"]`` holds the weights.

    Raises:
        ValueError: no sharded checkpoint at `folder`.
    """
    folder = Path(folder)
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder} is no sharded checkpoint folder: it has no .metadata file")
    checkpoint = _load_distributed_checkpoint(folder)
    optimizers = sorted(key for key in checkpoint if re.fullmatch(r"optimizer_\d+", key))
    checkpoint["optimizer_states"] = [checkpoint.pop(key) for key in optimizers]
    return checkpoint


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
