"""Perplexity of gold answers under teacher forcing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moevlm.batch import DEFAULT_VIEW, EncodedSample
from moevlm.models.vlm import VLM
from moevlm.preprocessing.collate import pack

Row = Mapping[str, Any]


def score_perplexity(rows: Sequence[Row]) -> dict[str, float]:
    """``perplexity = exp(sum of gold_nll / sum of num_gold_tokens)`` of rows that have both; {} when none has.

    The mean runs over answer tokens, the end token included, so a long answer weighs more than a short one.
    """
    scored = [row for row in rows if row.get("num_gold_tokens")]
    if not scored:
        return {}
    num_tokens = sum(row["num_gold_tokens"] for row in scored)
    nll = math.fsum(row["gold_nll"] for row in scored) / num_tokens
    return {"perplexity": math.exp(min(nll, 700.0)), "gold_nll": nll, "num_gold_tokens": num_tokens}


@torch.no_grad()
def gold_nlls(
    vlm: VLM,
    samples: Sequence[EncodedSample],
    *,
    batch_size: int,
    chunk_size: int = 1024,
    view: str = DEFAULT_VIEW,
) -> list[tuple[float, int]]:
    """Negative log-likelihood in nats of each sample's supervised tokens, and how many these are.

    Samples are packed `batch_size` at a time; logits exist for `chunk_size` rows at once, in float32.

    Args:
        vlm: in eval mode; its device is used.
        samples: whole conversations with labels, in any order; the answer keeps their order.
    """
    device = next(vlm.parameters()).device
    results: list[tuple[float, int]] = []
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]
        batch = pack(chosen).to(device)
        output = vlm(batch, view=view)
        rows_R, targets_R = output.prediction_rows(batch.labels)
        nll_R = _target_nlls(output.hidden_states[rows_R], vlm.head, targets_R, chunk_size)
        sequences_R = output.sequence_ids[rows_R]
        sums_B = torch.zeros(len(chosen), dtype=torch.float64, device=device).index_add_(0, sequences_R, nll_R)
        counts_B = torch.bincount(sequences_R, minlength=len(chosen))
        results.extend(zip(sums_B.tolist(), counts_B.tolist()))
    return results


def _target_nlls(hidden_RD: Tensor, head: Any, targets_R: Tensor, chunk_size: int) -> Tensor:
    chunks = [
        torch.nn.functional.cross_entropy(head.logits(hidden_CD), targets_C, reduction="none").double()
        for hidden_CD, targets_C in zip(hidden_RD.split(chunk_size), targets_R.split(chunk_size))
    ]
    return torch.cat(chunks) if chunks else hidden_RD.new_zeros(0, dtype=torch.float64)
