"""The passes of mimic distillation: over tokens that both models read, or over spans of two tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.mimic_settings import MimicPlan
from lightning_modules.objective import Objective
from moevlm.batch import Head, VLMBatch, VLMOutput, VocabularyMatch
from moevlm.losses.cross_tokenizer import span_loss, span_rows
from moevlm.losses.distillation import TokenLosses, token_losses
from moevlm.losses.mean import Mean, Unit
from moevlm.losses.selection import Selection, select
from moevlm.losses.stored_rows import stored_teacher_rows
from moevlm.losses.teacher_rows import HeadRows, TeacherRows
from moevlm.models.vlm import VLM


@dataclass(frozen=True)
class MimicPasses:
    """What the passes of one micro-batch have in common.

    Attributes:
        head: of the student.
        weights: of the losses at this step; their gradients are added up here (`Objective.joint`).
        kernel: of the losses.
    """

    head: Head
    plan: MimicPlan
    weights: Mapping[str, float]
    kernel: str = "auto"

    def over_tokens(
        self, name: str, rows: Selection, batch: VLMBatch, student: VLMOutput, teacher: TeacherRows
    ) -> Objective:
        """A divergence over the rows of a selection, with the cross-entropy where both look at the same ones.

        Args:
            name: of the loss: "kd", which is weighted by token, reported with telemetry and by source, or "visual_kd".
        """
        is_main, settings = name == "kd", self.plan.tokens
        with_lm = is_main and settings.selection == "answer"
        found = token_losses(
            student.hidden_states[rows.student_rows],
            self.head,
            teacher,
            rows.targets,
            divergence=settings.divergence,
            weighting=settings.weighting if is_main else "uniform",
            kd_weight=self.weights[name],
            lm_weight=self.weights["lm"] if with_lm else 0.0,
            measure_gradients=self.plan.measures_gradients and with_lm,
            kernel=self.kernel,
        )
        losses = {name: found.kd} | ({"lm": found.lm} if with_lm else {})
        sources_R = batch.sources[student.sequence_ids[rows.student_rows]]
        return _objective(losses, found, rows.unit, sources_R, settings.source_names if is_main else (), student)

    def against(self, teacher: VLM, batch: VLMBatch, student: VLMOutput, output: VLMOutput) -> Objective:
        """The token passes against a teacher that read the same tokens: kd, and visual_kd where it is wanted.

        Args:
            output: of the teacher.
        """
        settings = self.plan.tokens
        chosen = {
            "kd": select(settings.selection, batch, student, output, affinity_fraction=settings.affinity_fraction)
        }
        if "visual_kd" in self.plan.wanted:
            chosen["visual_kd"] = select("visual", batch, student, output)
        found = []
        for name, rows in chosen.items():
            theirs = HeadRows(output.hidden_states[rows.teacher_rows], teacher.head, self.head.weight.shape[0])
            found.append(self.over_tokens(name, rows, batch, student, theirs))
        first = found[0]
        for further in found[1:]:
            first.losses |= further.losses
            first.joint += further.joint
        return first

    def over_cache(self, batch: VLMBatch, student: VLMOutput, teacher_head: Head | None) -> Objective:
        """What a cache holds of a batch's supervised tokens; hidden states need the teacher's head."""
        cached = batch.cached_rows
        assert cached is not None
        rows_R, targets_R = student.prediction_rows(batch.labels)
        answers = Selection(rows_R, rows_R, targets_R, "targets")
        if cached.hidden_states is None:
            return self.over_tokens("kd", answers, batch, student, stored_teacher_rows(cached))
        assert teacher_head is not None
        states_RD = cached.hidden_states.to(teacher_head.weight.dtype)
        stored = HeadRows(states_RD, teacher_head, self.head.weight.shape[0])
        return self.over_tokens("kd", answers, batch, student, stored)

    def over_spans(self, batch: VLMBatch, student: VLMOutput, teacher: VLM, match: VocabularyMatch | None) -> Objective:
        """A teacher of another tokenizer reads a row of its own; the two meet in spans of text."""
        assert batch.teacher_batch is not None
        assert batch.spans is not None
        settings = self.plan.tokens
        assert settings.cross_tokenizer is not None
        bounds_K4 = batch.spans.bounds
        with torch.no_grad():
            other = span_rows(teacher(batch.teacher_batch), teacher.head, batch.teacher_batch, bounds_K4[:, 2:])
        kd = span_loss(
            span_rows(student, self.head, batch, bounds_K4[:, :2]),
            other,
            None if match is None else match.to(bounds_K4.device),
            method=settings.cross_tokenizer,
            divergence=settings.divergence,
            unmatched_weight=settings.unmatched_weight,
        )
        return Objective({"kd": kd}, output=student)


def _objective(
    losses: Mapping[str, Tensor],
    found: TokenLosses,
    unit: Unit,
    sources_R: Tensor,
    source_names: Sequence[str],
    output: VLMOutput,
) -> Objective:
    """Means over tokens, telemetry of "kd", losses by source.

    Args:
        losses: [R] values of each loss of the pass, by name; `found.joint` carries their gradient.
        sources_R: of each row, an index of `source_names`.
    """
    count = len(found.kd)
    metrics = {name: Mean(value_R.sum(), count, unit) for name, value_R in found.telemetry().items() if "kd" in losses}
    for index, source in enumerate(source_names):
        own_R = sources_R == index
        for name, value_R in losses.items():
            metrics[f"{name}_loss/{source}"] = Mean((value_R * own_R).sum(), int(own_R.sum()), unit)
    named = {name: Mean(value_R.sum(), count, unit) for name, value_R in losses.items()}
    return Objective(named, metrics, output, (Mean(found.joint, count, unit),))
