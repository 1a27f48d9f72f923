"""Watches the routers: a few numbers per layer at every step, the full grid and a heat map at validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.objective import StepRouting, sum_over_ranks
from moevlm.batch import Routing, Segment
from moevlm.metrics.routing import choice_counts_by_segment, entropy


class RoutingMonitor(Callback):
    """Log what the routers do; reads the routing records that the steps return and changes nothing.

    Every `every_n_steps` training steps, per MoE layer: ``train/max_over_mean_load/layer_03`` (1 is even, E is
    collapse), ``train/router_entropy/layer_03`` (nats) and ``train/dropped_fraction/layer_03``. At validation:
    ``moe/load/layer_03/expert_01`` and ``moe/importance/...`` (each sums to 1 per layer),
    ``moe/load_by_modality/image/...`` and ``.../text/...``, ``moe/entropy/layer_03``,
    ``moe/dropped_fraction/layer_03``, and a layers-by-experts heat map of the load in W&B where that logger is present.
    Counts are summed over ranks before any ratio is taken.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps must be at least 1, got {every_n_steps}; set callbacks.routing.every_n_steps"
            )
        self.every_n_steps = every_n_steps
        self._validation: RoutingCounts = RoutingCounts()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps or not outputs.get("routings"):
            return
        counts = RoutingCounts()
        counts.add(outputs["routings"])
        values: dict[str, float] = {}
        for layer, shares in counts.shares().items():
            values[f"train/max_over_mean_load/layer_{layer:02d}"] = float(shares["load"].max() * len(shares["load"]))
            values[f"train/router_entropy/layer_{layer:02d}"] = float(shares["entropy"])
            values[f"train/dropped_fraction/layer_{layer:02d}"] = float(shares["dropped_fraction"])
        pl_module.log_dict(values, on_step=True, on_epoch=False, rank_zero_only=True)

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._validation = RoutingCounts()

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validation.add(outputs["routings"])

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        shares = self._validation.shares()
        self._validation = RoutingCounts()
        if not shares:
            return
        pl_module.log_dict(_grid(shares), rank_zero_only=True)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero and not trainer.sanity_checking:
                logger.log_image("moe/load_map", [load_map(shares)], step=trainer.global_step)


class RoutingCounts:
    """Sums over tokens by layer, which add up over micro-batches and ranks."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # [num segments * E + E + 3]: choices, probabilities, entropy, drops, tokens

    def add(self, steps: list[StepRouting]) -> None:
        """Count the records of some micro-batches; they stay on their device."""
        for step in steps:
            for layer, routing in step.routings.items():
                sums = _layer_sums(routing, step.segments)
                self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    def shares(self) -> dict[int, dict[str, Tensor]]:
        """Ratios by layer and name, over all ranks, on the CPU. Collective: every rank has the same layers."""
        if not self._sums:
            return {}
        layers = sorted(self._sums)
        reduced = sum_over_ranks(torch.cat([self._sums[layer] for layer in layers])).cpu()
        parts = reduced.split([len(self._sums[layer]) for layer in layers])
        return {layer: _shares(part) for layer, part in zip(layers, parts)}


def load_map(shares: Mapping[int, Mapping[str, Tensor]]) -> np.ndarray:
    """Heat map of the load, MoE layers down, experts across, as an image [H, W, 3] uint8."""
    num_experts = max(len(share["load"]) for share in shares.values())
    loads = np.full((len(shares), num_experts), np.nan)
    for row, share in enumerate(shares.values()):
        loads[row, : len(share["load"])] = share["load"].numpy()
    figure = Figure(figsize=(2 + 0.5 * num_experts, 1.5 + 0.3 * len(shares)), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    image = axes.imshow(loads, vmin=0, cmap="cividis", aspect="auto")
    axes.set(xlabel="expert", ylabel="decoder layer", title="Expert load (share of choices)")
    axes.set_yticks(range(len(shares)), [str(layer) for layer in shares])
    figure.colorbar(image)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _layer_sums(routing: Routing, segments_T: Tensor) -> Tensor:
    num_tokens, num_experts = routing.router_probs.shape
    choices = choice_counts_by_segment(routing.expert_ids, segments_T, num_experts=num_experts)
    zero = choices.new_zeros(())
    scalars = torch.stack(
        [
            entropy(routing.router_probs) * num_tokens,
            zero if routing.dropped is None else routing.dropped.sum().to(choices.dtype),
            zero + num_tokens,
        ]
    )
    return torch.cat([choices.flatten(), routing.router_probs.float().sum(dim=0), scalars]).double()


def _shares(sums: Tensor) -> dict[str, Tensor]:
    num_experts = (len(sums) - 3) // (len(Segment) + 1)
    choices_GE = sums[: len(Segment) * num_experts].view(len(Segment), num_experts)
    entropy_sum, num_dropped, num_tokens = sums[-3:]
    image_E, all_E = choices_GE[Segment.IMAGE], choices_GE.sum(dim=0)
    return {
        "load": _normalised(all_E),
        "image_load": _normalised(image_E),
        "text_load": _normalised(all_E - image_E),
        "importance": sums[len(Segment) * num_experts : -3] / num_tokens.clamp(min=1),
        "entropy": entropy_sum / num_tokens.clamp(min=1),
        "dropped_fraction": num_dropped / all_E.sum().clamp(min=1),
    }


def _normalised(counts_E: Tensor) -> Tensor:
    return counts_E / counts_E.sum().clamp(min=1)


def _grid(shares: Mapping[int, Mapping[str, Tensor]]) -> dict[str, float]:
    vectors = {
        "load": "moe/load",
        "importance": "moe/importance",
        "image_load": "moe/load_by_modality/image",
        "text_load": "moe/load_by_modality/text",
    }
    values: dict[str, float] = {}
    for layer, share in shares.items():
        for name, prefix in vectors.items():
            for expert, value in enumerate(share[name].tolist()):
                values[f"{prefix}/layer_{layer:02d}/expert_{expert:02d}"] = value
        for name in ("entropy", "dropped_fraction"):
            values[f"moe/{name}/layer_{layer:02d}"] = float(share[name])
    return values
