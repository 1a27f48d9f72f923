"""Triton: from logits to choices and weights in one pass, and back in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048  # of a tile of tokens by experts


@triton.jit
def _log_scores(logits, known, SIGMOID: tl.constexpr):
    """Logarithms of the scores, and the probabilities: their softmax (of a softmax, itself)."""
    if SIGMOID:
        scores = tl.minimum(logits, 0.0) - tl.log(1 + tl.exp(-tl.abs(logits)))
    else:
        scores = logits
    scores = tl.where(known, scores, -float("inf"))
    shifted = scores - tl.max(scores, axis=1)[:, None]
    powers = tl.exp(shifted)
    total = tl.sum(powers, axis=1)[:, None]
    log_scores = scores if SIGMOID else shifted - tl.log(total)
    return log_scores, powers / total


@triton.jit
def _choose(
    logits_ptr, bias_ptr, probs_ptr, ids_ptr, weights_ptr, num_tokens, num_experts,
    SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr, TOP_K: tl.constexpr,
    T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * T + tl.arange(0, T)
    experts = tl.arange(0, E)[None, :]
    known = (tokens < num_tokens)[:, None] & (experts < num_experts)
    places = tokens[:, None] * num_experts + experts
    logits = tl.load(logits_ptr + places, mask=known, other=0.0)
    log_scores, probs = _log_scores(logits, experts < num_experts, SIGMOID)
    tl.store(probs_ptr + places, probs, mask=known)
    ranked = logits
    if HAS_BIAS:
        ranked = tl.exp(log_scores) + tl.load(bias_ptr + experts, mask=experts < num_experts, other=0.0)
    # whatever a logit is, NaN too, an expert that exists comes before the tile's padding
    ranked = tl.where(ranked > -3e38, ranked, -3e38)
    ranked = tl.where(experts < num_experts, ranked, -float("inf"))
    choice_of = tl.full((T, E), -1, dtype=tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(ranked, axis=1, tie_break_left=True)[:, None]
        choice_of = tl.where(experts == best, k, choice_of)
        ranked = tl.where(experts == best, -float("inf"), ranked)
    chosen = choice_of >= 0
    if not NORMALISE:
        weights = tl.exp(log_scores)
    elif TOP_K == 1:
        weights = tl.full((T, E), 1.0, dtype=tl.float32)
    else:
        most = tl.max(tl.where(chosen, log_scores, -float("inf")), axis=1)[:, None]
        powers = tl.where(chosen, tl.exp(log_scores - most), 0.0)
        weights = powers / tl.sum(powers, axis=1)[:, None]
    places = tokens[:, None] * TOP_K + choice_of
    tl.store(ids_ptr + places, (experts + tl.zeros((T, E), dtype=tl.int32)).to(tl.int64), mask=chosen & known)
    tl.store(weights_ptr + places, weights, mask=chosen & known)


@triton.jit
def _choose_backward(
    logits_ptr, ids_ptr, weights_ptr, probs_grad_ptr, weights_grad_ptr, out_ptr, num_tokens, num_experts,
    SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, HAS_PROBS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    TOP_K: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * T + tl.arange(0, T)
    experts = tl.arange(0, E)[None, :]
    known = (tokens < num_tokens)[:, None] & (experts < num_experts)
    places = tokens[:, None] * num_experts + experts
    logits = tl.load(logits_ptr + places, mask=known, other=0.0)
    _, probs = _log_scores(logits, experts < num_experts, SIGMOID)
    grad = tl.zeros((T, E), dtype=tl.float32)  # of the logarithms of the scores
    if HAS_WEIGHTS:
        mean = tl.zeros((T,), dtype=tl.float32)
        for k in tl.static_range(TOP_K):
            place = tokens * TOP_K + k
            weight = tl.load(weights_ptr + place, mask=tokens < num_tokens, other=0.0)
            mean += weight * tl.load(weights_grad_ptr + place, mask=tokens < num_tokens, other=0.0)
        for k in tl.static_range(TOP_K):
            place = tokens * TOP_K + k
            expert = tl.load(ids_ptr + place, mask=tokens < num_tokens, other=-1).to(tl.int32)
            weight = tl.load(weights_ptr + place, mask=tokens < num_tokens, other=0.0)
            weight_grad = tl.load(weights_grad_ptr + place, mask=tokens < num_tokens, other=0.0)
            if NORMALISE and TOP_K > 1:
                weight_grad -= mean
            grad = tl.where(experts == expert[:, None], (weight_grad * weight)[:, None], grad)
    if HAS_PROBS:
        probs_grad = tl.load(probs_grad_ptr + places, mask=known, other=0.0)
        grad += probs * (probs_grad - tl.sum(probs * probs_grad, axis=1)[:, None])
    if SIGMOID:
        out = grad * tl.sigmoid(-logits)
    else:  # the gradient of the probabilities sums to 0 over experts: only that of the weights feels the normalisation
        out = grad - probs * tl.sum(grad, axis=1)[:, None]
    tl.store(out_ptr + places, out, mask=known)


def choose(
    logits_TE: Tensor, bias_E: Tensor | None, *, top_k: int, score: str, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moevlm.ops.plain_steps.choose`."""
    num_tokens, num_experts = logits_TE.shape
    probs_TE = torch.empty_like(logits_TE)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    if num_tokens:
        tile = _tile(num_experts)
        _choose[(triton.cdiv(num_tokens, tile["T"]),)](
            logits_TE, logits_TE if bias_E is None else bias_E, probs_TE, ids_TK, weights_TK, num_tokens, num_experts,
            SIGMOID=score == "sigmoid", NORMALISE=normalise, HAS_BIAS=bias_E is not None, TOP_K=top_k, **tile,
        )  # fmt: skip
    return probs_TE, ids_TK, weights_TK


def choose_backward(
    logits_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    probs_grad_TE: Tensor | None,
    weights_grad_TK: Tensor | None,
    *,
    score: str,
    normalise: bool,
) -> Tensor:
    """See `moevlm.ops.plain_steps.choose_backward`."""
    (num_tokens, num_experts), top_k = logits_TE.shape, ids_TK.shape[1]
    out_TE, ids_TK, weights_TK = torch.empty_like(logits_TE), ids_TK.contiguous(), weights_TK.contiguous()
    if num_tokens:
        tile = _tile(num_experts)
        _choose_backward[(triton.cdiv(num_tokens, tile["T"]),)](
            logits_TE, ids_TK, weights_TK, logits_TE if probs_grad_TE is None else probs_grad_TE,
            weights_TK if weights_grad_TK is None else weights_grad_TK, out_TE, num_tokens, num_experts,
            SIGMOID=score == "sigmoid", NORMALISE=normalise, HAS_PROBS=probs_grad_TE is not None,
            HAS_WEIGHTS=weights_grad_TK is not None, TOP_K=top_k, **tile,
        )  # fmt: skip
    return out_TE


def _tile(num_experts: int) -> dict[str, int]:
    experts = max(2, triton.next_power_of_2(num_experts))
    return {"T": NUMBERS // experts, "E": experts}
