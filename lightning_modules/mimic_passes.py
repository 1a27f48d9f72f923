"""The passes of mimic distillation: over tokens that both models read, or over spans of two tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.objective import Objective
from moevlm.batch import CachedRows, Head, VLMBatch, VLMOutput, VocabularyMatch
from moevlm.losses.cross_tokenizer import check_method, span_loss, span_rows
from moevlm.losses.distillation import TokenLosses, check_weighting, token_losses
from moevlm.losses.divergences import Divergence
from moevlm.losses.mean import Mean, Unit
from moevlm.losses.selection import Selection, check_selection
from moevlm.losses.stored_rows import stored_teacher_rows
from moevlm.losses.teacher_rows import HeadRows, TeacherRows
from moevlm.models.vlm import VLM


@dataclass(frozen=True)
class TokenSettings:
    """How tokens are compared; checked when made."""

    divergence: Divergence
    weighting: str  # one of `moevlm.losses.distillation.WEIGHTINGS`
    tokens: str  # a selection of `moevlm.losses.selection`
    affinity_fraction: float
    cross_tokenizer: str | None  # a method of `moevlm.losses.cross_tokenizer`, for a teacher of another tokenizer
    unmatched_weight: float
    source_names: Sequence[str]  # losses are logged for each; none for no sources

    def __post_init__(self) -> None:
        check_weighting(self.weighting)
        check_selection(self.tokens, self.affinity_fraction)
        check_method(self.cross_tokenizer)


def token_pass(
    name: str,
    rows: Selection,
    batch: VLMBatch,
    student: VLMOutput,
    head: Head,
    teacher: TeacherRows,
    settings: TokenSettings,
    *,
    weights: Mapping[str, float],
    with_lm: bool = False,
    measure_gradients: bool = False,
    kernel: str = "auto",
) -> Objective:
    """A divergence over the rows of a selection, with the cross-entropy where both look at the same ones.

    Args:
        name: of the loss: "kd", which is weighted by token, reported with telemetry and by source, or "visual_kd".
        head: of the student.
        weights: of the losses at this step; their gradients are added up here (`Objective.joint`).
        with_lm: the rows are those of the supervised tokens.
        kernel: of the loss.
    """
    is_main = name == "kd"
    found = token_losses(
        student.hidden_states[rows.student_rows],
        head,
        teacher,
        rows.targets,
        divergence=settings.divergence,
        weighting=settings.weighting if is_main else "uniform",
        kd_weight=weights[name],
        lm_weight=weights["lm"] if with_lm else 0.0,
        measure_gradients=measure_gradients and with_lm,
        kernel=kernel,
    )
    losses = {name: found.kd} | ({"lm": found.lm} if with_lm else {})
    sources_R = batch.sources[student.sequence_ids[rows.student_rows]]
    return _objective(losses, found, rows.unit, sources_R, settings.source_names if is_main else (), student)


def span_pass(
    batch: VLMBatch,
    student: VLMOutput,
    head: Head,
    teacher: VLM,
    match: VocabularyMatch | None,
    settings: TokenSettings,
) -> Mean:
    """A teacher of another tokenizer reads a row of its own; the two meet in spans of text."""
    assert batch.teacher_batch is not None
    assert batch.spans is not None
    assert settings.cross_tokenizer is not None
    bounds_K4 = batch.spans.bounds
    with torch.no_grad():
        other = span_rows(teacher(batch.teacher_batch), teacher.head, batch.teacher_batch, bounds_K4[:, 2:])
    return span_loss(
        span_rows(student, head, batch, bounds_K4[:, :2]),
        other,
        None if match is None else match.to(bounds_K4.device),
        method=settings.cross_tokenizer,
        divergence=settings.divergence,
        unmatched_weight=settings.unmatched_weight,
    )


def cached_teacher_rows(cached: CachedRows, teacher_head: Head | None, num_common: int) -> TeacherRows:
    """What a cache holds of a batch's supervised tokens; hidden states need the teacher's head."""
    if cached.hidden_states is None:
        return stored_teacher_rows(cached)
    assert teacher_head is not None
    return HeadRows(cached.hidden_states.to(teacher_head.weight.dtype), teacher_head, num_common)


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
