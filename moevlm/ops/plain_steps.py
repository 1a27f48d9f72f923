"""The steps of a routed SwiGLU layer, slow and plain: what the Triton kernels compute, and what a CPU runs.

``choice`` c = t * K + k numbers the flattened choices; ``row`` numbers the kept ones ordered by expert, then by token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from moevlm.ops.routing import expert_scores, top_k_routing


def choose(
    logits_TE: Tensor, bias_E: Tensor | None, *, top_k: int, score: str, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [T, E], choices [T, K] int64 and their weights [T, K] of `top_k_routing`; float32."""
    routing = top_k_routing(logits_TE, top_k=top_k, score=score, normalise=normalise, selection_bias_E=bias_E)
    return routing.router_probs, routing.expert_ids, routing.expert_weights


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
    """The gradient of the logits, given those of `choose`'s probabilities p and weights w (None: nobody wants them).

    With s the logarithms of the scores: ``ds = p * (dp - sum(p * dp))``, plus at the choices ``w * dw``, from which
    ``w * sum(w * dw)`` is taken if normalised over several. Softmax scores give ``ds - p * sum(ds)``, sigmoid ones
    ``ds * sigmoid(-logits)``.
    """
    _, probs_TE = expert_scores(logits_TE, score=score)
    grad_TE = torch.zeros_like(logits_TE)
    if weights_grad_TK is not None:
        parts_TK = weights_TK * weights_grad_TK
        if normalise and ids_TK.shape[1] > 1:
            parts_TK = parts_TK - weights_TK * parts_TK.sum(dim=1, keepdim=True)
        grad_TE.scatter_(1, ids_TK, parts_TK)
    if probs_grad_TE is not None:
        grad_TE += probs_TE * (probs_grad_TE - (probs_TE * probs_grad_TE).sum(dim=1, keepdim=True))
    if score == "sigmoid":
        return grad_TE * torch.sigmoid(-logits_TE)
    return grad_TE - probs_TE * grad_TE.sum(dim=1, keepdim=True)


def sort_choices(
    expert_ids_TK: Tensor, dropped_TK: Tensor | None, *, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The row of every choice, the choice of every row, and the rows of every expert.

    Args:
        expert_ids_TK: in [0, E).
        dropped_TK: choices that get no row; None: all have one.

    Returns:
        [T, K] int32, -1 where dropped; [T * K] int32, any choice behind the first ``counts.sum()``; [E] int32.
    """
    ids_C = expert_ids_TK.flatten()
    if dropped_TK is not None:
        ids_C = torch.where(dropped_TK.flatten(), num_experts, ids_C)  # behind every real expert
    choice_of_row_C = torch.argsort(ids_C, stable=True)
    row_of_choice_C = torch.empty_like(choice_of_row_C)
    row_of_choice_C[choice_of_row_C] = torch.arange(ids_C.numel(), device=ids_C.device)
    row_of_choice_C = torch.where(ids_C < num_experts, row_of_choice_C, -1)
    counts_E = torch.bincount(ids_C, minlength=num_experts)[:num_experts]
    return row_of_choice_C.view_as(expert_ids_TK).int(), choice_of_row_C.int(), counts_E.int()


def gather_rows(source_TD: Tensor, choice_of_row_R: Tensor, out_RD: Tensor, *, top_k: int) -> None:
    """``out[r] = source[choice_of_row[r] // K]``."""
    torch.index_select(source_TD, 0, torch.div(choice_of_row_R, top_k, rounding_mode="floor"), out=out_RD)


def sum_rows(rows_MD: Tensor, row_of_choice_TK: Tensor) -> Tensor:
    """``out[t] = sum over k of rows[row_of_choice[t, k]]`` in float32, a dropped choice adds 0; [T, D] as `rows_MD`."""
    kept_TK1 = (row_of_choice_TK >= 0).unsqueeze(-1)
    if rows_MD.shape[0] == 0:
        return rows_MD.new_zeros(row_of_choice_TK.shape[0], rows_MD.shape[1])
    rows_TKD = rows_MD[row_of_choice_TK.clamp_min(0)].float()
    return torch.where(kept_TK1, rows_TKD, 0.0).sum(dim=1).to(rows_MD.dtype)


def swiglu(gate_RF: Tensor, up_RF: Tensor, weights_TK: Tensor, choice_of_row_R: Tensor, out_RF: Tensor) -> None:
    """``out = w * silu(gate) * up``, w the weight of a row's choice (SwiGLU, arXiv:2002.05202; the weight is ours).

    A weight inside the expert is a weight on its output, as the last map is linear, and saves a pass over the output.
    """
    weights_R1 = weights_TK.flatten()[choice_of_row_R].float().unsqueeze(1)
    gate_RF = gate_RF.float()
    out_RF.copy_(gate_RF * torch.sigmoid(gate_RF) * up_RF.float() * weights_R1)


def swiglu_backward(
    gate_RF: Tensor,
    up_RF: Tensor,
    weights_TK: Tensor,
    choice_of_row_R: Tensor,
    grad_RF: Tensor,
    *,
    out_RF: Tensor,
    up_grad_RF: Tensor,
    weights_grad_TK: Tensor,
) -> None:
    """The gradients of `swiglu` given that of its result, ``grad``; and its result again, for the last map's gradient.

    ``grad_RF`` is overwritten with the gradient of gate. Of ``weights_grad_TK`` the choices of these rows are written.
    """
    choices_R = choice_of_row_R.long()
    weights_R1 = weights_TK.flatten()[choices_R].float().unsqueeze(1)
    gate, up, grad = gate_RF.float(), up_RF.float(), grad_RF.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    weights_grad_TK.view(-1)[choices_R] = (grad * silu * up).sum(dim=1)
    out_RF.copy_(silu * up * weights_R1)
    grad = grad * weights_R1
    grad_RF.copy_(grad * up * (sigmoid + silu * (1 - sigmoid)))
    up_grad_RF.copy_(grad * silu)


def router_logits(hidden_TD: Tensor, weight_ED: Tensor, rounded_TD: Tensor | None = None) -> Tensor:
    """``hidden @ weight.T`` in float32, [T, E]; `weight_ED` is float32. Writes the tokens into `rounded_TD` as well."""
    if rounded_TD is not None:
        rounded_TD.copy_(hidden_TD)
    return linear(hidden_TD.float(), weight_ED)


def router_hidden_grad(
    logits_grad_TE: Tensor, weight_ED: Tensor, passed_TD: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``passed + logits_grad @ weight``, added in float32; `passed_TD` is the gradient that came past the router."""
    grad_TD = logits_grad_TE @ weight_ED
    return (grad_TD if passed_TD is None else grad_TD + passed_TD.float()).to(dtype)


def router_weight_grad(logits_grad_TE: Tensor, hidden_TD: Tensor) -> Tensor:
    """``logits_grad.T @ hidden`` in float32, [E, D]."""
    return logits_grad_TE.T @ hidden_TD.float()
