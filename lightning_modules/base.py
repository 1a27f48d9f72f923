"""What the stages of vision-language models share: building, freezing, sharding, router losses, a frozen teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Unpack

import torch
from torch import nn

from lightning_modules.objective import Objective, StepRouting, Weight
from lightning_modules.reports import model_counts
from lightning_modules.router_losses import domain_losses, router_losses, update_selection_biases
from lightning_modules.stage import MakeOptimizer, MakeScheduler, Stage, StageSettings
from lightning_modules.teachers import (
    TeacherOptions,
    check_vision_cache,
    has_same_vision,
    place_teacher,
    shared_features,
)
from moevlm.batch import TEACHER_VIEW, Head, VLMBatch, VLMOutput
from moevlm.losses.fused import check_kernel
from moevlm.losses.language_modeling import cross_entropy
from moevlm.losses.mean import REDUCTIONS, Mean
from moevlm.models.freezing import freeze_except
from moevlm.models.pretrained import save_pretrained
from moevlm.models.sharding import shard, shard_module
from moevlm.models.vlm import VLM

ROUTER_LOSSES: dict[str, Weight] = {"load_balancing": 0.01, "router_z": 0.0, "domain_router": 0.0}
"""Default weights of the router losses; MoE-LLaVA (arXiv:2401.15947) and LLaVA-MoD use 0.01 for load balancing.

domain_router teaches routers the source of a sample (Mixture of Modular Experts): expert e is that of source e."""


class Frozen(NamedTuple):
    """A model beside the one that trains."""

    model: VLM
    move: Callable[[torch.device], None]  # brings it to the stage's device
    shares_vision: bool  # whether it takes the student's image features


class VLMStage(Stage):
    """A stage that trains a vision-language model; it has no objective of its own.

    A child's `__init__` says what trains and the weights of its losses, its `compute_losses` is the objective.
    """

    model: VLM
    frozen: dict[str, Frozen]  # by name; a plain dict, so that torch does not find modules in it

    default_weights: Mapping[str, Weight] = {"lm": 1.0, **ROUTER_LOSSES}

    def __init__(
        self,
        build_model: Callable[[], VLM],
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        *,
        trainable: Sequence[str],
        loss_weights: Mapping[str, Weight] | None = None,
        router_losses_over_layers: str = "mean",
        balance_over_ranks: bool = False,
        loss_kernel: str = "auto",
        **settings: Unpack[StageSettings],
    ) -> None:
        """Keep the builder; `loss_weights` replace the stage's `default_weights` entry by entry.

        Hyper-parameters are plain values: a checkpoint with a builder in it would not load with ``weights_only=True``.

        Args:
            router_losses_over_layers: "mean", or "sum" as MoE-LLaVA.
            loss_kernel: of cross-entropy and forward KL, one of `moevlm.losses.fused.KERNELS`.
            balance_over_ranks: in training, take the load of the balance loss over all ranks instead of each alone.
        """
        if router_losses_over_layers not in REDUCTIONS:
            raise ValueError(
                f"unknown router_losses_over_layers {router_losses_over_layers!r}; known: {', '.join(REDUCTIONS)}; "
                "set stage.router_losses_over_layers"
            )
        check_kernel(loss_kernel)
        weights = {**self.default_weights, **(loss_weights or {})}
        super().__init__(optimizer, scheduler, trainable=trainable, loss_weights=weights, **settings)
        self.build_model, self.frozen = build_model, {}
        self.teacher_head: Head | None = None
        self.router_losses_over_layers, self.balance_over_ranks = router_losses_over_layers, balance_over_ranks
        self.loss_kernel = loss_kernel

    def configure_model(self) -> None:
        """Build, freeze, shard. Here and not in __init__, so that a strategy can shard."""
        if self.model is None:  # called again before validate and test
            model = self.build_model()
            self.build_beside(model)
            self.set_model(model)

    def build_beside(self, model: VLM) -> None:
        """Build what stands beside the model: frozen models, modules that train with it. Nothing by default.

        Before a checkpoint is read: what is made from the model is the same after a resume.

        Args:
            model: neither frozen nor sharded yet.
        """

    def set_model(self, model: VLM) -> None:
        """Freeze and shard the model, and make it the one that trains."""
        check_vision_cache(model, self.trainable, self.provided("vision"))
        self.model = self.shard(freeze_except(model, self.trainable).train())

    def set_beside(self, modules: nn.ModuleDict) -> None:
        """Keep modules that train with the model; sharded like it, in the stage's checkpoints, in no model folder."""
        for module in modules.values():
            shard_module(module, **self._sharding())
        self.beside = modules

    def shard(self, model: VLM) -> VLM:
        """Shard over the strategy's devices; the same model under DDP and on one device."""
        return shard(model, **self._sharding())

    def _sharding(self) -> dict[str, Any]:
        """The devices to shard over, None for whole models, and the precision of the computation."""
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        return {"device_mesh": mesh, "param_dtype": getattr(self.trainer.strategy, "param_dtype", None)}

    def set_teacher(
        self, teacher: VLM, options: TeacherOptions | None = None, student: VLM | None = None, *, name: str = "teacher"
    ) -> None:
        """Keep a frozen model outside the module tree: no checkpoint, optimizer or DDP sees it.

        Args:
            options: where and how; by default as the student.
            student: not sharded yet; when given, and its vision encoder is the teacher's, images are encoded once.
            name: by which `ask_teacher` finds it; "teacher" is also ``self.teacher``.
        """
        options = options or TeacherOptions()
        is_same = student is not None and options.share_vision and has_same_vision(student, teacher, self.trainable)
        move = place_teacher(teacher, options, **self._sharding())
        self.frozen[name] = Frozen(teacher, move, is_same)

    def set_teacher_head(self, head: Head) -> None:
        """Keep the vocabulary projection alone, for cached hidden states; the rest of the teacher is given back."""
        bias = None if head.bias is None else head.bias.detach().clone()
        self.teacher_head = dataclasses.replace(head, weight=head.weight.detach().clone(), bias=bias)

    @property
    def teacher(self) -> VLM:
        """The frozen model called "teacher"."""
        return self.frozen["teacher"].model

    @torch.no_grad()
    def ask_teacher(
        self,
        batch: VLMBatch,
        student: VLMOutput,
        *,
        view: str = TEACHER_VIEW,
        name: str = "teacher",
        keep: Mapping[str, Any] = MappingProxyType({}),
    ) -> VLMOutput:
        """A frozen model's forward pass over the student's batch, in its own view of the images.

        Args:
            keep: what else it returns, see `VLM.forward`.
        """
        frozen = self.frozen[name]
        if not frozen.shares_vision and view in batch.features:  # of another encoder than this model's
            batch = dataclasses.replace(batch, features={})
        features = shared_features(batch, student, view=view) if frozen.shares_vision else None
        return frozen.model(batch, view=view, visual_features=features, **keep)  # type: ignore[no-any-return]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._check_images()
        self._place_teacher()

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.global_step == 0:
            for logger in self.loggers:
                logger.log_metrics(model_counts(self.model), step=0)

    def on_validation_start(self) -> None:
        self._place_teacher()

    def _check_images(self) -> None:
        """The data's images are those that the model was made for."""
        processor = getattr(getattr(self.trainer, "datamodule", None), "processor", None)
        if processor is not None and self.model.vision_encoder is not None:
            transform = processor.image_transform
            self.model.vision_encoder.check_images(
                image_size=transform.image_size, mean=transform.mean, std=transform.std
            )

    def _place_teacher(self) -> None:
        for frozen in self.frozen.values():
            frozen.move(self.device)
        if self.teacher_head is not None:
            self.teacher_head = self.teacher_head.to(self.device)

    def save_model(self, folder: str | Path, processor: Any = None) -> None:
        """Write a self-contained model folder; under FSDP2 every rank must call this, the first one writes.

        Args:
            folder: created when needed.
            processor: anything with ``save_pretrained(folder)``; tokenizer and image transform of the model.
        """
        save_pretrained(self.model, folder)
        if processor is not None and self.global_rank == 0:
            processor.save_pretrained(folder)

    def count_units(self, batch: VLMBatch) -> dict[str, int]:
        return {
            "targets": batch.num_targets,
            "tokens": self.model.count_tokens(batch),
            "sequences": batch.num_sequences,
            "pairs": batch.num_pairs,
        }

    def language_modeling(self, batch: VLMBatch) -> Objective:
        """Cross-entropy on the supervised tokens, and the router losses."""
        output = self.model(batch)
        losses = {"lm": cross_entropy(output, self.model.head, batch.labels, kernel=self.loss_kernel)}
        return Objective(losses | self.router_losses(output), output=output)

    def router_losses(self, output: VLMOutput) -> dict[str, Mean]:
        """Load balancing, router z-loss, supervision by domains; empty without routers or weights."""
        supervised: dict[str, Mean] = {}
        if self.is_weighted("domain_router"):
            if not output.routings and output.domain_logits is None:
                raise ValueError(
                    "domain_router needs a router; set model to a sparse or modular one, or its weight to 0"
                )
            supervised = domain_losses(output)
        if not output.routings:
            return supervised
        names = [name for name in ROUTER_LOSSES if self.is_weighted(name)]
        # only in training: ranks may validate unequal numbers of batches
        over_ranks = self.balance_over_ranks and torch.is_grad_enabled()
        found = router_losses(output.routings, names, over_layers=self.router_losses_over_layers, over_ranks=over_ranks)
        return found | supervised

    def after_step(self, routings: Sequence[StepRouting]) -> None:
        update_selection_biases(self.model.moe_layers, routings)
