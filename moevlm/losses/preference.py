"""Preference losses on pairs of a chosen and a rejected answer: DPO, hinge, IPO, SimPO, KTO and LLaVA-MoD's paired KTO.

With ``r = log pi(y) - log pi_ref(y)`` the log-ratio of an answer, each loss sees r of the chosen and of the rejected
answer of a pair. They differ in what they do with them. Log-ratios are made in `moevlm.losses.references`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moevlm.batch import IGNORE_INDEX, NO_PAIR, VLMBatch
from moevlm.losses.mean import Mean


@dataclass(frozen=True)
class Preference:
    """A preference loss with its settings; checked when made."""

    loss: str = "dpo"  # a key of PREFERENCE_LOSSES
    beta: float = 0.1  # how strongly the policy is held to the reference
    margin: float = 0.0  # gamma of "simpo": what the chosen answer's reward must be ahead by
    desirable_weight: float = 1.0  # of the chosen answers in "kto"
    undesirable_weight: float = 1.0  # of the rejected answers in "kto"

    def __post_init__(self) -> None:
        if self.loss not in PREFERENCE_LOSSES:
            raise ValueError(f"loss must be one of {sorted(PREFERENCE_LOSSES)}, got {self.loss!r}; set stage.loss")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}; set stage.beta")
        if self.margin and self.loss != "simpo":
            raise ValueError(f"margin {self.margin} has no effect on {self.loss!r}; set stage.margin=0, or stage.loss")
        if self.margin < 0:
            raise ValueError(f"margin must not be negative, got {self.margin}; set stage.margin")
        for name in ("desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if value < 0 or (value != 1.0 and self.loss != "kto"):
                raise ValueError(f"{name} must not be negative and is of 'kto' only, got {value}; set stage.{name}")

    @property
    def needs_mismatched_kl(self) -> bool:
        """Whether `preference_loss` wants `mismatched_kl`, which costs a forward pass of both models."""
        return self.loss == "kto"


def dpo(chosen_P: Tensor, rejected_P: Tensor, settings: Preference) -> Tensor:
    """``-log sigmoid(beta (r_chosen - r_rejected))``: DPO (arXiv:2305.18290), Eq. 7; log 2 at equal log-ratios."""
    return -logsigmoid(settings.beta * (chosen_P - rejected_P))


def hinge(chosen_P: Tensor, rejected_P: Tensor, settings: Preference) -> Tensor:
    """``max(0, 1 - beta (r_chosen - r_rejected))``: SLiC-HF (arXiv:2305.10425) of log-ratios, as RSO (2309.06657)."""
    return torch.relu(1 - settings.beta * (chosen_P - rejected_P))


def ipo(chosen_P: Tensor, rejected_P: Tensor, settings: Preference) -> Tensor:
    """``(r_chosen - r_rejected - 1 / (2 beta))^2``: IPO (arXiv:2310.12036), Eq. 17 with tau = beta.

    The square of a sum grows with the answer: the authors' results are of log-ratios per token (aggregation "mean").
    """
    return (chosen_P - rejected_P - 1 / (2 * settings.beta)).square()


def simpo(chosen_P: Tensor, rejected_P: Tensor, settings: Preference) -> Tensor:
    """``-log sigmoid(beta (r_chosen - r_rejected) - gamma)``: SimPO (arXiv:2405.14734), Eq. 6.

    There r is the mean log-probability of a token and there is no reference (aggregation "mean", reference "none").
    """
    return -logsigmoid(settings.beta * (chosen_P - rejected_P) - settings.margin)


def kto_pair(chosen_P: Tensor, rejected_P: Tensor, settings: Preference) -> Tensor:
    """``(1 - sigmoid(beta (r_chosen - z_rejected)) + 1 - sigmoid(beta (z_chosen - r_rejected))) / 2``.

    KTO (arXiv:2402.01306), Eq. 7, with the reference points taken from the other half of the pairs, as LLaVA-MoD does:
    ``z = max(0, mean r)`` over the pairs of the micro-batch. Deviation from LLaVA-MoD's code: z is detached, as in the
    paper. z is a statistic of a micro-batch, so this loss depends on how a step is split; give it several pairs.
    1/2 at equal log-ratios of 0.
    """
    num_pairs, beta = max(chosen_P.numel(), 1), settings.beta
    chosen_z = (chosen_P.detach().sum() / num_pairs).clamp(min=0)
    rejected_z = (rejected_P.detach().sum() / num_pairs).clamp(min=0)
    desirable_P = 1 - torch.sigmoid(beta * (chosen_P - rejected_z))
    undesirable_P = 1 - torch.sigmoid(beta * (chosen_z - rejected_P))
    return (desirable_P + undesirable_P) / 2


def kto(chosen_P: Tensor, rejected_P: Tensor, settings: Preference, mismatched_kl: Tensor) -> Tensor:
    """``(w_D (1 - sigmoid(beta (r_chosen - z))) + w_U (1 - sigmoid(beta (z - r_rejected)))) / 2``.

    KTO (arXiv:2402.01306), Eq. 7-8: z estimates ``KL(pi || pi_ref)`` as ``max(0, mean r)`` over prompts with the answer
    to another prompt, see `moevlm.preprocessing.mismatch`; it carries no gradient. 1/2 at log-ratios and z of 0.

    Args:
        mismatched_kl: scalar, mean log-ratio of mismatched answers over all ranks, before the clamp.
    """
    z, beta = mismatched_kl.detach().clamp(min=0), settings.beta
    desirable_P = 1 - torch.sigmoid(beta * (chosen_P - z))
    undesirable_P = 1 - torch.sigmoid(beta * (z - rejected_P))
    return (settings.desirable_weight * desirable_P + settings.undesirable_weight * undesirable_P) / 2


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": simpo,
    "kto": kto,
    "kto_pair": kto_pair,
}


def preference_loss(
    chosen_P: Tensor, rejected_P: Tensor, settings: Preference, *, mismatched_kl: Tensor | None = None
) -> Mean:
    """Sum over pairs of the settings' loss of the pairs' log-ratios; unit "pairs"; 0 without a pair.

    Args:
        chosen_P: log-ratios of the chosen answers; gradient.
        rejected_P: of the rejected answers; gradient.
        mismatched_kl: for "kto" only.
    """
    extra = () if mismatched_kl is None else (mismatched_kl,)
    values_P = PREFERENCE_LOSSES[settings.loss](chosen_P, rejected_P, settings, *extra)
    return Mean(values_P.sum(), chosen_P.numel(), "pairs")


def split_pairs(values_B: Tensor, pair_ids_B: Tensor, is_chosen_B: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the chosen and of the rejected sequences, [P] each, pair by pair; sequences of no pair are left out.

    Raises:
        ValueError: a pair lacks its other half in this batch.
    """
    paired_B = pair_ids_B != NO_PAIR
    halves = []
    for is_half_B in (paired_B & is_chosen_B, paired_B & ~is_chosen_B):
        indices_P = torch.nonzero(is_half_B).squeeze(1)
        halves.append(indices_P[torch.argsort(pair_ids_B[indices_P])])
    if not torch.equal(pair_ids_B[halves[0]], pair_ids_B[halves[1]]):
        raise ValueError(
            f"every pair needs one chosen and one rejected sequence in the same micro-batch, got pairs "
            f"{pair_ids_B[halves[0]].tolist()} chosen and {pair_ids_B[halves[1]].tolist()} rejected"
        )
    return values_B[halves[0]], values_B[halves[1]]


def check_pairs(batch: VLMBatch) -> None:
    """Raise a ValueError unless every sequence of the micro-batch belongs to a pair."""
    if 2 * batch.num_pairs != batch.num_sequences:
        lonely = [key for key, pair in zip(batch.keys, batch.pair_ids.tolist()) if pair < 0] or list(batch.keys)
        raise ValueError(
            f"{batch.num_sequences} sequences make {batch.num_pairs} pairs: preference distillation needs a "
            f"rejected answer beside each chosen one, which {', '.join(lonely[:3])} lacks; set data to preferences"
        )


def chosen_labels(batch: VLMBatch) -> Tensor:
    """[T] the labels of the chosen answers alone."""
    return torch.where(batch.is_chosen[batch.sequence_ids()], batch.labels, IGNORE_INDEX)


def reward_metrics(chosen_P: Tensor, rejected_P: Tensor, *, beta: float) -> dict[str, Mean]:
    """The implicit rewards ``beta * r``: of the chosen, of the rejected, their margin, and how often it is positive."""
    chosen_P, rejected_P = beta * chosen_P.detach(), beta * rejected_P.detach()
    values = {
        "chosen_reward": chosen_P,
        "rejected_reward": rejected_P,
        "reward_margin": chosen_P - rejected_P,
        "reward_accuracy": (chosen_P > rejected_P).float(),
    }
    return {name: Mean(value_P.sum(), value_P.numel(), "pairs") for name, value_P in values.items()}
