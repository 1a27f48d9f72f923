"""One optimizer step: denominators, micro-batches, clipping, logging. Shared by VLM stages and backbone pretraining."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.loggers import JsonlLogger, read_rows
from lightning_modules.objective import (
    UNITS,
    Objective,
    StepRouting,
    Totals,
    Weight,
    check_weights,
    final_weight,
    is_ever_positive,
    step_seed,
    sum_over_ranks,
    weight_at,
)
from lightning_modules.parameters import MakeOptimizer, build_optimizer
from lightning_modules.reports import print_trainable
from lightning_modules.wandb_record import refill
from lightning_modules.weighting import AdaptiveWeights
from moevlm.batch import VocabularyMatch

MakeScheduler = Callable[[Optimizer], LRScheduler]

BUILDERS = ("build_model", "build_teacher", "build_teachers", "build_encoder", "optimizer", "scheduler")
"""Constructor arguments that are no plain values: they stay out of `save_hyperparameters`, hence out of checkpoints."""


class StageSettings(TypedDict, total=False):
    """Settings that every stage passes on to `Stage`; described there."""

    gradient_clip_norm: float | None
    lr_multipliers: Mapping[str, float] | None
    max_nonfinite_steps: int
    adaptive_weights: Mapping[str, Any] | None
    seed: int


class VLMStageSettings(StageSettings, total=False):
    """Settings that every stage of a vision-language model passes on; described in `VLMStage`."""

    router_losses_over_layers: str
    balance_over_ranks: bool
    loss_kernel: str


class Stage(LightningModule):
    """One optimizer step per loader item, with every loss divided by its count over micro-batches and ranks.

    Optimization is manual: a step's micro-batches come together, so that the denominators are known before the first
    backward pass and any split of a global batch gives the same step. A child gives `model` (in `configure_model`),
    `compute_losses` and `count_units`.
    """

    model: Any
    default_weights: Mapping[str, Weight] = {}  # by loss name: every loss that the stage knows
    measured_gradients: Sequence[str] = ()  # losses whose gradient to the logits it can log, see `AdaptiveWeights`

    def __init__(
        self,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None,
        *,
        trainable: Sequence[str],
        loss_weights: Mapping[str, Weight],
        gradient_clip_norm: float | None = 1.0,
        lr_multipliers: Mapping[str, float] | None = None,
        max_nonfinite_steps: int = 0,
        adaptive_weights: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Check and keep the settings; models are built later, in `configure_model`.

        Args:
            optimizer: takes parameter groups; an optimizer class with everything else filled in.
            scheduler: takes the optimizer; None keeps the learning rate.
            trainable: regular expressions over parameter names; everything else is frozen.
            loss_weights: by loss name, a number or a linear schedule.
            gradient_clip_norm: global norm over all trainable parameters; None measures and does not clip.
            lr_multipliers: regular expression over parameter names -> factor on the learning rate.
            max_nonfinite_steps: steps whose gradient is not finite before the run ends; each changes no parameter.
            adaptive_weights: ``{losses, rule, window}``: the weights of these losses follow the run, see
                `AdaptiveWeights`.
            seed: of whatever is random within a step.
        """
        super().__init__()
        check_weights(loss_weights, list(self.default_weights))
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise ValueError(
                f"gradient_clip_norm must be positive, or null for none, got {gradient_clip_norm}; "
                "set stage.gradient_clip_norm"
            )
        self.automatic_optimization = False
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.trainable, self.loss_weights = list(trainable), dict(loss_weights)
        self.gradient_clip_norm, self.lr_multipliers = gradient_clip_norm, dict(lr_multipliers or {})
        self.max_nonfinite_steps, self.num_nonfinite_steps, self.seed = max_nonfinite_steps, 0, seed
        self.adaptive = None
        if adaptive_weights is not None:
            known = list(self.default_weights)
            self.adaptive = AdaptiveWeights.parse(adaptive_weights, known, self.measured_gradients)
        self.model = None
        self.beside = nn.ModuleDict()  # what trains with the model and is no part of it: in checkpoints, in no folder
        self._validation = Totals()

    def compute_losses(self, batch: Any) -> Objective:
        """Unweighted losses by name, each a (sum, count): only this class divides."""
        raise NotImplementedError

    def count_units(self, batch: Any) -> dict[str, int]:
        """How many units of each kind that a loss of this stage divides by are in the micro-batch."""
        raise NotImplementedError

    def prepare_step(self, micro_batches: list[Any]) -> list[Any]:
        """What a training step does to its data before anything is counted; nothing, unless a stage says otherwise."""
        return micro_batches

    def step_weights(self) -> dict[str, float]:
        """The weight of every loss at the present optimizer step."""
        return self._adapted({name: weight_at(weight, self.global_step) for name, weight in self.loss_weights.items()})

    def provided(self, kind: str) -> list[str]:
        """Which "rows", "reference" or "vision" the batches carry from caches (`VLMDataModule.provides`)."""
        datamodule = getattr(self._trainer, "datamodule", None)
        found = (name.split(":", 1) for name in getattr(datamodule, "provides", frozenset()))
        return [name for prefix, name in found if prefix == kind]

    def vocabulary_match(self) -> VocabularyMatch | None:
        """Which tokens the student shares with a teacher of another tokenizer (`VLMDataModule.vocabulary_match`)."""
        return getattr(getattr(self._trainer, "datamodule", None), "vocabulary_match", None)

    def is_weighted(self, name: str) -> bool:
        """Whether a loss counts at any step; others need not be computed."""
        return is_ever_positive(self.loss_weights.get(name, 0.0))

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.make_optimizer, self.model, self.lr_multipliers, beside=self.beside)
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another model in one line (torch itself checks a sharded checkpoint).

        Raises:
            ValueError: names or shapes differ.
        """
        if self.adaptive is not None:
            self.adaptive.load_state_dict(checkpoint.get("adaptive_weights", {}))
        if "state_dict" not in checkpoint:
            return
        there = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        here = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        differing = [name for name in here | there if here.get(name) != there.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"the run folder holds the checkpoint of another model: {len(differing)} weights differ, the first is "
                f"{name}, {there.get(name, 'missing')} there and {here.get(name, 'missing')} here; remove the run's "
                "checkpoints or set another run_name"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adaptive is not None:
            checkpoint["adaptive_weights"] = self.adaptive.state_dict()

    def on_fit_start(self) -> None:
        if self.trainer.is_global_zero:
            print_trainable(self.model)

    def on_train_start(self) -> None:
        records = [logger for logger in self.loggers if isinstance(logger, JsonlLogger)]
        for record in records:
            record.drop_rows_after(self.global_step)
        for logger in self.loggers:
            if isinstance(logger, WandbLogger) and records and self.trainer.is_global_zero and self.global_step:
                refill(logger, read_rows(records[0].path))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Lightning's count of logged steps is one off after some restarts; a row's number is the optimizer's
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step

    def training_step(self, step: Any, batch_idx: int) -> dict[str, Any]:
        torch.manual_seed(step_seed(self.seed, self.global_rank, self.global_step))
        micro_batches = self.prepare_step(step if isinstance(step, list) else [step])
        weights = self.step_weights()
        local_counts = [self.count_units(batch) for batch in micro_batches]
        counts = self._sum_counts(local_counts)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        totals, routings = Totals(), []
        for index, batch in enumerate(micro_batches):
            objective = self.compute_losses(batch)
            loss = _weighted_total(objective, weights, counts, local_counts[index])
            with self._gradient_sync(index == len(micro_batches) - 1):
                self.manual_backward(loss * self.trainer.world_size)  # DDP and FSDP average over ranks
            totals.add(objective)
            routings.append(objective.step_routing())
        self._optimizer_step(optimizer)
        self.after_step(_present(routings))
        means = totals.means()
        means["loss"] = _total(means, weights)
        if self.adaptive is not None:
            self.adaptive.observe(means)
        logged: dict[str, Any] = {f"{name}_weight": value for name, value in weights.items() if f"{name}_loss" in means}
        self.log_dict(
            {f"train/{name}": value for name, value in {**means, **logged}.items()}, on_step=True, on_epoch=False
        )
        return {"loss": means["loss"], "counts": counts, "routings": _present(routings)}

    def after_step(self, routings: Sequence[StepRouting]) -> None:
        """What follows the optimizer's step and is part of it: a checkpoint written next has it. Nothing by default."""

    def on_validation_epoch_start(self) -> None:
        self._validation = Totals()

    def validation_step(self, step: Any, batch_idx: int) -> dict[str, Any]:
        objectives = [self.compute_losses(batch) for batch in (step if isinstance(step, list) else [step])]
        for objective in objectives:
            self._validation.add(objective)
        return {"routings": _present([objective.step_routing() for objective in objectives])}

    def on_validation_epoch_end(self) -> None:
        means = self._validation.means()
        weights = self._adapted({name: final_weight(weight) for name, weight in self.loss_weights.items()})
        means["loss"] = _total(means, weights)
        self.log_dict({f"val/{name}": value for name, value in means.items()}, sync_dist=True)

    def _adapted(self, weights: dict[str, float]) -> dict[str, float]:
        factors = {} if self.adaptive is None else self.adaptive.factors()
        return {name: weight * factors.get(name, 1.0) for name, weight in weights.items()}

    def _optimizer_step(self, optimizer: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip_norm or float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm).item():
            self._count_nonfinite(float(norm))
            optimizer.zero_grad()  # without gradients the step below changes no parameter
        self.log("optim/grad_norm", norm, on_step=True, on_epoch=False)
        self.log("optim/lr", optimizer.param_groups[0]["lr"], on_step=True, on_epoch=False)
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def _count_nonfinite(self, norm: float) -> None:
        self.num_nonfinite_steps += 1
        if self.num_nonfinite_steps > self.max_nonfinite_steps:
            raise ValueError(
                f"the gradient norm at step {self.global_step} is {norm}, not finite "
                f"({self.num_nonfinite_steps} such steps, {self.max_nonfinite_steps} allowed); lower optimizer.lr, "
                "look at the step's samples, or set stage.max_nonfinite_steps"
            )
        self.log("optim/nonfinite_steps", float(self.num_nonfinite_steps), on_step=True, on_epoch=False)

    def _sum_counts(self, local_counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
        """Units of the whole step, over micro-batches and ranks."""
        sums = [sum(counts.get(unit, 0) for counts in local_counts) for unit in UNITS]
        values = sum_over_ranks(torch.tensor(sums, dtype=torch.float64, device=self.device))
        return dict(zip(UNITS, values.tolist()))

    def _gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP adds up gradients over micro-batches before it exchanges them once; FSDP2 exchanges every time."""
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel) and not is_last:
            return wrapped.no_sync()
        return contextlib.nullcontext()


def _weighted_total(
    objective: Objective, weights: Mapping[str, float], counts: Mapping[str, float], local: Mapping[str, int]
) -> Tensor:
    """The weighted sum of the losses over the step's counts; a joint gradient changes no value."""
    terms = []
    for name, loss in objective.losses.items():
        assert loss.count == local[loss.unit], (name, loss.count, local)
        terms.append(weights[name] * loss.sum / max(counts[loss.unit], 1))
    for joint in objective.joint:
        terms.append((joint.sum - joint.sum.detach()) / max(counts[joint.unit], 1))
    return torch.stack(terms).sum()


def _total(means: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    return torch.stack(
        [weight * means[f"{name}_loss"] for name, weight in weights.items() if f"{name}_loss" in means]
    ).sum()


def _present(routings: Sequence[StepRouting | None]) -> list[StepRouting]:
    return [routing for routing in routings if routing is not None]
