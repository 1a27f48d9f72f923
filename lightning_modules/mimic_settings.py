"""Settings of mimic distillation: how tokens are compared, and what a cache or another tokenizer cannot answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lightning_modules.stage import VLMStageSettings
from moevlm.losses.cross_tokenizer import check_method
from moevlm.losses.distillation import check_weighting
from moevlm.losses.divergences import Divergence
from moevlm.losses.selection import check_selection


class MimicSettings(VLMStageSettings, total=False):
    """Settings of `TokenSettings`, as keys of ``stage``, beside those of every stage.

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


@dataclass(frozen=True)
class TokenSettings:
    """How tokens are compared; checked when made."""

    divergence: Divergence
    weighting: str = "uniform"
    tokens: str = "answer"
    affinity_fraction: float = 0.5
    cross_tokenizer: str | None = None
    unmatched_weight: float = 1.0
    source_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_weighting(self.weighting)
        check_selection(self.tokens, self.affinity_fraction)
        check_method(self.cross_tokenizer)

    def check_answers_suffice(self, wanted: Sequence[str], what: str, remedy: str) -> None:
        """Refuse losses that look at more than the answers' tokens, of which alone some sources know.

        Args:
            wanted: names of the further losses that have a weight.
            what: the source.
            remedy: how to do without it.
        """
        asked = [*wanted, *([] if self.tokens == "answer" else [f"kd_tokens={self.tokens}"])]
        if asked:
            raise ValueError(
                f"{what} knows the answers' tokens only, not what {', '.join(asked)} looks at; set {remedy}, or "
                "weight 0 in stage.loss_weights and stage.kd_tokens=answer"
            )


def split_settings(settings: MimicSettings) -> tuple[TokenSettings, VLMStageSettings]:
    """Those of the tokens, with their defaults, and the others."""
    others: dict[str, Any] = dict(settings)
    own: Mapping[str, Any] = {key: others.pop(key) for key in OWN if key in others}
    divergence = Divergence(
        own.get("divergence", "forward_kl"),
        own.get("temperature", 1.0),
        own.get("divergence_beta", 0.5),
        own.get("divergence_skew", 0.1),
        own.get("z_normed", False),
    )
    named = {RENAMED.get(key, key): value for key, value in own.items() if key not in OF_DIVERGENCE}
    return TokenSettings(divergence, **named), cast(VLMStageSettings, others)


OWN = MimicSettings.__optional_keys__ - VLMStageSettings.__optional_keys__
OF_DIVERGENCE = {"divergence", "temperature", "divergence_beta", "divergence_skew", "z_normed"}
RENAMED = {"token_weighting": "weighting", "kd_tokens": "tokens"}
"""Keys of ``stage`` that say more than the fields of `TokenSettings` need to."""
