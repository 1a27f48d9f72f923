"""Preference distillation: prefer faithful answers, measured against a frozen reference model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_modules.base import ROUTER_LOSSES, VLMStage
from lightning_modules.moe_tuning import FFNS_AND_CONNECTOR
from lightning_modules.objective import Objective, Weight, sum_over_ranks
from lightning_modules.stage import BUILDERS, MakeOptimizer, MakeScheduler, VLMStageSettings
from lightning_modules.teachers import TeacherOptions
from moevlm.batch import DEFAULT_VIEW, IGNORE_INDEX, TEACHER_VIEW, VLMBatch, VLMOutput
from moevlm.losses.language_modeling import cross_entropy
from moevlm.losses.mean import Mean
from moevlm.losses.preference import (
    Preference,
    check_pairs,
    chosen_labels,
    preference_loss,
    reward_metrics,
    split_pairs,
)
from moevlm.losses.references import Reference, log_ratios
from moevlm.models.vlm import VLM
from moevlm.preprocessing.mismatch import mismatched_batch


class PreferenceDistillation(VLMStage):
    """Preference optimization with the teacher as the reference (LLaVA-MoD, arXiv:2408.15881, preference distillation).

    Chosen and rejected answers of a pair stand in one packed row, so one forward pass of each model serves both.
    """

    default_weights = {"preference": 1.0, "lm": 0.0, **ROUTER_LOSSES}

    def __init__(
        self,
        build_model: Callable[[], VLM],
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        *,
        build_teacher: Callable[[], VLM] | None = None,
        reference: str = "teacher",
        teacher_share: float = 0.5,
        loss: str = "dpo",
        beta: float = 0.1,
        margin: float = 0.0,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        aggregation: str = "sum",
        teacher_options: Mapping[str, Any] | None = None,
        trainable: Sequence[str] = FFNS_AND_CONNECTOR,
        loss_weights: Mapping[str, Weight] | None = None,
        **settings: Unpack[VLMStageSettings],
    ) -> None:
        """Losses: preference, lm (on the chosen answers, an anchor), load_balancing, router_z.

        Args:
            build_model: the policy.
            build_teacher: needed for the references "teacher" and "blend", not built otherwise.
            reference: a key of `moevlm.losses.references.REFERENCES`.
            teacher_share: of the teacher in "blend".
            loss: "dpo", "hinge", "ipo", "simpo", "kto" or "kto_pair"; formulas in `moevlm.losses.preference`.
            beta: how strongly the policy is held to the reference.
            margin: of "simpo".
            desirable_weight: of "kto"; undesirable_weight likewise.
            aggregation: "sum" or "mean" of a sequence's token log-probabilities.
            teacher_options: placement, quantization, share_vision of the references; see `TeacherOptions`.
        """
        super().__init__(build_model, optimizer, scheduler, trainable=trainable, loss_weights=loss_weights, **settings)
        self.preference = Preference(loss, beta, margin, desirable_weight, undesirable_weight)
        self.reference = Reference(reference, teacher_share, aggregation)
        if "teacher" in self.reference.models and build_teacher is None:
            raise ValueError(
                f"reference {reference!r} needs a teacher; set stage.build_teacher, or stage.reference=self"
            )
        self.save_hyperparameters(ignore=BUILDERS)
        self.build_teacher, self.teacher_options = build_teacher, TeacherOptions.parse(teacher_options)

    def build_beside(self, model: VLM) -> None:
        """The references that are run: caches know the answers of the pairs, not those of a mismatched KL."""
        cached = [] if self.preference.needs_mismatched_kl else self.provided("reference")
        for name in self.reference.models:
            if name not in cached:
                build = self.build_teacher if name == "teacher" else partial(deepcopy, model)
                assert build is not None
                self.set_teacher(build(), self.teacher_options, model, name=name)

    def count_units(self, batch: VLMBatch) -> dict[str, int]:
        check_pairs(batch)
        chosen = int((chosen_labels(batch) != IGNORE_INDEX).sum()) if self.is_weighted("lm") else 0
        return {**super().count_units(batch), "targets": chosen}

    def compute_losses(self, batch: VLMBatch) -> Objective:
        policy = self.model(batch)
        log_ratios_B, metrics = self._log_ratios(batch, policy)
        chosen_P, rejected_P = split_pairs(log_ratios_B, batch.pair_ids, batch.is_chosen)
        mismatched_kl = self._mismatched_kl(batch) if self.preference.needs_mismatched_kl else None
        losses = {"preference": preference_loss(chosen_P, rejected_P, self.preference, mismatched_kl=mismatched_kl)}
        if self.is_weighted("lm"):
            losses["lm"] = cross_entropy(policy, self.model.head, chosen_labels(batch), kernel=self.loss_kernel)
        metrics |= reward_metrics(chosen_P, rejected_P, beta=self.preference.beta)
        if mismatched_kl is not None:
            metrics["mismatched_kl"] = Mean(mismatched_kl * chosen_P.numel(), chosen_P.numel(), "pairs")
        return Objective(losses | self.router_losses(policy), metrics, policy)

    def _log_ratios(self, batch: VLMBatch, policy: VLMOutput) -> tuple[Tensor, dict[str, Mean]]:
        asked = {}
        for name in self.frozen:
            output = self.ask_teacher(batch, policy, view=DEFAULT_VIEW if name == "self" else TEACHER_VIEW, name=name)
            rows_R, _ = output.prediction_rows(batch.labels)
            asked[name] = output.hidden_states[rows_R], self.frozen[name].model.head
        return log_ratios(batch, policy, self.model.head, asked, self.reference)

    @torch.no_grad()
    def _mismatched_kl(self, batch: VLMBatch) -> Tensor:
        """Mean log-ratio of answers to other prompts, over this micro-batch of every rank. Collective."""
        mismatched = mismatched_batch(batch)
        log_ratios_B, _ = self._log_ratios(mismatched, self.model(mismatched))
        total, count = sum_over_ranks(torch.stack([log_ratios_B.sum(), log_ratios_B.new_tensor(len(log_ratios_B))]))
        return total / count
