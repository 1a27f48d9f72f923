"""Preference losses on pairs of a chosen and a rejected answer: DPO, IPO, paired KTO.

With ``r = log pi(y) - log pi_ref(y)`` the log-ratio of an answer, each loss sees r of the chosen and of the rejected
answer of a pair. They differ in what they do with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.checkpoint import checkpoint

from moevlm.batch import IGNORE_INDEX, NO_PAIR, Head, VLMOutput
from moevlm.losses.chunked import row_chunks
from moevlm.losses.mean import Mean

PairLoss = Callable[[Tensor, Tensor, float], Tensor]
"""(log-ratios [P] of the chosen, of the rejected, beta) -> [P]."""


def sequence_log_probs(
    output: VLMOutput,
    head: Head,
    labels_T: Tensor,
    sequence_ids_T: Tensor,
    *,
    length_normalised: bool = False,
    chunk_size: int = 1024,
) -> Tensor:
    """[B] float32 log-probability of each sequence's supervised tokens; nats.

    ``sum_t log softmax(head.logits(h_{t-1}))[label_t]`` over the supervised tokens t of a sequence, or their mean (as
    in SimPO, arXiv:2405.14734). Logits are made for one chunk of rows at a time, and again in backward: the weight of
    a row's gradient is known only then. A sequence without a supervised token has 0.

    Args:
        output: of the model that owns `head`.
        head: read after the forward pass.
        labels_T: text coordinates, not shifted.
        sequence_ids_T: the sequence of each text token.
        length_normalised: mean instead of sum.
        chunk_size: rows whose logits exist at the same time.
    """
    rows_R, targets_R = output.prediction_rows(labels_T)
    hidden_RD = output.hidden_states[rows_R]

    def log_probs(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return -cross_entropy(head.logits(hidden_CD), targets_C, reduction="none")

    log_probs_R = torch.cat(
        [head.logits(hidden_RD[:0]).sum(dim=-1)]  # keeps hidden states and head in the graph when there is no row
        + [
            checkpoint(log_probs, hidden_RD[chunk], targets_R[chunk], use_reentrant=False, preserve_rng_state=False)
            for chunk in row_chunks(rows_R.numel(), chunk_size)
        ]
    )
    sequences_R = sequence_ids_T[labels_T != IGNORE_INDEX]
    totals_B = log_probs_R.new_zeros(len(output.lengths)).index_add(0, sequences_R, log_probs_R)
    if not length_normalised:
        return totals_B
    return totals_B / torch.bincount(sequences_R, minlength=len(output.lengths)).clamp(min=1)


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


def dpo(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """``-log sigmoid(beta (r_chosen - r_rejected))``: DPO (arXiv:2305.18290), Eq. 7; log 2 at equal log-ratios."""
    return -logsigmoid(beta * (chosen_P - rejected_P))


def ipo(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """``(r_chosen - r_rejected - 1 / (2 beta))^2``: IPO (arXiv:2310.12036), Eq. 17 with tau = beta."""
    return (chosen_P - rejected_P - 1 / (2 * beta)).square()


def kto_pair(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """``(1 - sigmoid(beta (r_chosen - z_rejected)) + 1 - sigmoid(beta (z_chosen - r_rejected))) / 2``.

    KTO (arXiv:2402.01306), Eq. 7, with the reference points taken from the other half of the pairs, as LLaVA-MoD does:
    ``z = max(0, mean r)`` over the pairs of the micro-batch. Deviation from LLaVA-MoD's code: z is detached, as in the
    paper. z is a statistic of a micro-batch, so this loss depends on how a step is split; give it several pairs.
    1/2 at equal log-ratios of 0.
    """
    num_pairs = max(chosen_P.numel(), 1)
    chosen_z = (chosen_P.detach().sum() / num_pairs).clamp(min=0)
    rejected_z = (rejected_P.detach().sum() / num_pairs).clamp(min=0)
    desirable_P = 1 - torch.sigmoid(beta * (chosen_P - rejected_z))
    undesirable_P = 1 - torch.sigmoid(beta * (chosen_z - rejected_P))
    return (desirable_P + undesirable_P) / 2


PREFERENCE_LOSSES: dict[str, PairLoss] = {"dpo": dpo, "ipo": ipo, "kto": kto_pair}


def check_preference_loss(loss: str, beta: float) -> None:
    """Raise a ValueError for a choice that `preference_loss` does not know."""
    if loss not in PREFERENCE_LOSSES:
        raise ValueError(f"loss must be one of {sorted(PREFERENCE_LOSSES)}, got {loss!r}; set stage.loss")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}; set stage.beta")


def preference_loss(chosen_P: Tensor, rejected_P: Tensor, *, loss: str = "dpo", beta: float = 0.1) -> Mean:
    """Sum over pairs of the named loss of the pairs' log-ratios; unit "pairs".

    Raises:
        ValueError: unknown loss or beta out of range.
    """
    check_preference_loss(loss, beta)
    return Mean(PREFERENCE_LOSSES[loss](chosen_P, rejected_P, beta).sum(), chosen_P.numel(), "pairs")


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
