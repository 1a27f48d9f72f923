"""Settings of mimic distillation: how tokens are compared, and what a cache or another tokenizer cannot answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lightning_modules.distillation_terms import TERM_WEIGHTS, TermSettings
from lightning_modules.on_policy import OnPolicy
from lightning_modules.stage import VLMStageSettings
from lightning_modules.teachers import TeacherOptions
from moevlm.batch import VLMBatch
from moevlm.losses.cross_tokenizer import check_method
from moevlm.losses.distillation import check_weighting
from moevlm.losses.divergences import Divergence
from moevlm.losses.selection import check_selection


class MimicSettings(VLMStageSettings, total=False):
    """Keys of ``stage`` beside those of every stage; their defaults are in `_parse_tokens`.

    temperature: of both distributions; the loss is scaled by its square.
    divergence: a key of `moevlm.losses.divergences.DIVERGENCES`.
    divergence_beta: weight of the teacher in the mixture of "jsd".
    divergence_skew: share of the first argument in the mixture of the skewed divergences.
    z_normed: standardise each row of logits, as LLaVADI does.
    token_weighting: how much a token's divergence counts; one of `moevlm.losses.distillation.WEIGHTINGS`.
    kd_tokens: which tokens kd looks at; a selection of `moevlm.losses.selection`.
    affinity_fraction: the share of each answer's tokens that the selection "affinity" keeps.
    source_names: of the data sources, in their order; kd and lm are then logged for each.
    cross_tokenizer: "uld" or "gold" for a teacher of another tokenizer, see `moevlm.losses.cross_tokenizer`.
    unmatched_weight: in "gold", of the tokens that only one of the vocabularies has.
    terms: layers and distances of the losses hidden and attention, see `TermSettings`.
    teacher_options: placement, quantization, share_vision; see `TeacherOptions`.
    on_policy: ``{fraction, max_new_tokens, temperature}``, see `OnPolicy`: in that share of the steps the student
        answers for itself, and only the divergence counts (GKD).
    """

    temperature: float
    divergence: str
    divergence_beta: float
    divergence_skew: float
    z_normed: bool
    token_weighting: str
    kd_tokens: str
    affinity_fraction: float
    source_names: Sequence[str]
    cross_tokenizer: str | None
    unmatched_weight: float
    terms: Mapping[str, Any] | None
    teacher_options: Mapping[str, Any] | None
    on_policy: Mapping[str, Any] | None


@dataclass(frozen=True)
class TokenSettings:
    """How tokens are compared; checked when made."""

    divergence: Divergence
    weighting: str
    selection: str
    affinity_fraction: float
    cross_tokenizer: str | None
    unmatched_weight: float
    source_names: Sequence[str]

    def __post_init__(self) -> None:
        check_weighting(self.weighting)
        check_selection(self.selection, self.affinity_fraction)
        check_method(self.cross_tokenizer)
        if self.weighting == "teacher_correctness" and self.selection in ("visual", "all"):
            raise ValueError(
                f"token_weighting=teacher_correctness asks for given tokens, and kd_tokens={self.selection} "
                "holds visual tokens, of which none is given; set stage.kd_tokens=answer or text, or another "
                "stage.token_weighting"
            )

    def check_tokenizers(self, batch: VLMBatch) -> None:
        """Refuse a batch that was encoded for another number of tokenizers than the stage compares."""
        if (batch.teacher_batch is None) != (self.cross_tokenizer is None):
            raise ValueError(
                "stage.cross_tokenizer and data.cross_tokenizer (with data.teacher_processor) come together; set both, "
                "or neither"
            )


@dataclass(frozen=True)
class MimicPlan:
    """What a mimic stage was asked for, in parts that were checked, each alone and all together."""

    tokens: TokenSettings
    terms: TermSettings
    teacher_options: TeacherOptions
    on_policy: OnPolicy
    wanted: Sequence[str]  # the losses that have a weight
    measures_gradients: bool  # of kd and lm to the logits, for adaptive weights

    @classmethod
    def parse(cls, settings: MimicSettings, wanted: Sequence[str], *, measures_gradients: bool) -> MimicPlan:
        """From the keys of ``stage``.

        Raises:
            ValueError: an unknown value, or settings that exclude each other.
        """
        tokens, terms = _parse_tokens(settings), TermSettings.parse(settings.get("terms"), wanted)
        options = TeacherOptions.parse(settings.get("teacher_options"))
        plan = cls(tokens, terms, options, OnPolicy.parse(settings.get("on_policy")), wanted, measures_gradients)
        if measures_gradients and tokens.selection != "answer":
            raise ValueError("gradient_norm compares kd and lm on the same tokens; set stage.kd_tokens=answer")
        if tokens.cross_tokenizer is not None:
            plan.check_answers_suffice("a teacher of another tokenizer", "stage.cross_tokenizer=null")
        return plan

    def check_answers_suffice(self, teacher: str, remedy: str) -> None:
        """Refuse what looks at more than the given answers' tokens, for a teacher that knows of these alone.

        Args:
            teacher: what it is.
            remedy: how to do without it.
        """
        asked = [name for name in ("visual_kd", *TERM_WEIGHTS) if name in self.wanted]
        asked += [] if self.tokens.selection == "answer" else [f"kd_tokens={self.tokens.selection}"]
        asked += ["on_policy"] if self.on_policy.fraction else []
        if asked:
            raise ValueError(
                f"{teacher} knows the given answers' tokens only, not what {', '.join(asked)} looks at; set {remedy}, "
                "or weight 0 in stage.loss_weights, stage.kd_tokens=answer and stage.on_policy=null"
            )


def shared_settings(settings: MimicSettings) -> VLMStageSettings:
    """All but the own ones of mimic distillation, misspelt ones too: `Stage` refuses these."""
    own = MimicSettings.__optional_keys__ - VLMStageSettings.__optional_keys__
    return cast(VLMStageSettings, {key: value for key, value in settings.items() if key not in own})


def _parse_tokens(settings: MimicSettings) -> TokenSettings:
    divergence = Divergence(
        settings.get("divergence", "forward_kl"),
        settings.get("temperature", 1.0),
        settings.get("divergence_beta", 0.5),
        settings.get("divergence_skew", 0.1),
        settings.get("z_normed", False),
    )
    return TokenSettings(
        divergence,
        settings.get("token_weighting", "uniform"),
        settings.get("kd_tokens", "answer"),
        settings.get("affinity_fraction", 0.5),
        settings.get("cross_tokenizer"),
        settings.get("unmatched_weight", 1.0),
        settings.get("source_names", ()),
    )
