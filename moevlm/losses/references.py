"""What a policy is measured against: frozen models, at hand or cached, and the log-ratios of answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from moevlm.batch import IGNORE_INDEX, Head, VLMBatch, VLMOutput
from moevlm.losses.log_probs import row_log_probs, sum_by_sequence
from moevlm.losses.mean import Mean

REFERENCES: dict[str, tuple[str, ...]] = {
    "teacher": ("teacher",),
    "self": ("self",),
    "blend": ("teacher", "self"),
    "none": (),
}
"""The frozen models of each reference: the teacher, a copy of the policy as it was built, both, or none (SimPO)."""

AGGREGATIONS = ("sum", "mean")


@dataclass(frozen=True)
class Reference:
    """A reference with its settings; checked when made."""

    kind: str = "teacher"  # a key of REFERENCES
    teacher_share: float = 0.5  # of the teacher in "blend"
    aggregation: str = "sum"  # of a sequence's token log-probabilities; one of AGGREGATIONS

    def __post_init__(self) -> None:
        if self.kind not in REFERENCES:
            known = ", ".join(REFERENCES)
            raise ValueError(f"reference must be one of {known}, got {self.kind!r}; set stage.reference")
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must lie in [0, 1], got {self.teacher_share}; set stage.teacher_share")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"aggregation must be one of {AGGREGATIONS}, got {self.aggregation!r}; set stage.aggregation"
            )

    @property
    def models(self) -> tuple[str, ...]:
        """The names of its frozen models."""
        return REFERENCES[self.kind]


def log_ratios(
    batch: VLMBatch, policy: VLMOutput, head: Head, asked: Mapping[str, tuple[Tensor, Head]], reference: Reference
) -> tuple[Tensor, dict[str, Mean]]:
    """``log pi(y) - log pi_ref(y)`` of each answer y; log pi is a sum or mean over its tokens, log pi_ref 0 for "none".

    Args:
        batch: its `reference_log_probs` stand for the models that are not asked.
        policy: gradient.
        head: of the policy; gradient, unless frozen.
        asked: by name, of the models at hand: states of the rows that predict the answers, and the head; no gradient.

    Returns:
        [B] nats, and metrics by name: the KL from the policy to the reference, a mean over the answers' tokens, where
        all of the reference is at hand. A cache holds no distribution.
    """
    rows_R, targets_R = policy.prediction_rows(batch.labels)
    found = row_log_probs(policy.hidden_states[rows_R], head, targets_R, list(asked.values()))
    add_up = partial(
        sum_by_sequence,
        sequences_R=batch.sequence_ids()[batch.labels != IGNORE_INDEX],
        num_sequences=batch.num_sequences,
        mean=reference.aggregation == "mean",
    )
    if not reference.models:
        return add_up(found.policy), {}
    theirs = dict(zip(asked, map(add_up, found.references))) | _cached(batch, reference, set(asked))
    log_ratios_B = add_up(found.policy) - blend_references(theirs, reference.teacher_share)
    if len(asked) < len(reference.models):
        return log_ratios_B, {}
    kl_R = blend_references(dict(zip(asked, found.kl)), reference.teacher_share)
    return log_ratios_B, {"reference_kl": Mean(kl_R.sum(), rows_R.numel(), "targets")}


def blend_references(log_probs: Mapping[str, Tensor], teacher_share: float) -> Tensor:
    """``a log pi_teacher(y) + (1 - a) log pi_self(y)``, [B]: the reference ``pi_teacher^a pi_self^(1-a) / Z(x)``. Ours.

    Z depends on the prompt alone, so it cancels in every loss of a difference of log-ratios. With the keys of one
    reference only, that one.
    """
    if set(log_probs) != {"teacher", "self"}:
        (only,) = log_probs.values()
        return only
    return teacher_share * log_probs["teacher"] + (1 - teacher_share) * log_probs["self"]


def _cached(batch: VLMBatch, reference: Reference, asked: set[str]) -> dict[str, Tensor]:
    """[B] by name; a cache holds the sum over an answer's tokens."""
    divisors_B = batch.targets_per_sequence().clamp(min=1) if reference.aggregation == "mean" else 1
    return {name: batch.reference_log_probs[name] / divisors_B for name in reference.models if name not in asked}
