"""`top_k_routing` in one pass forward and one pass backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moevlm.batch import Routing
from moevlm.ops.routing import check_top_k
from moevlm.ops.steps import Steps, steps_for


def fused_top_k_routing(
    router_logits_TE: Tensor,
    *,
    top_k: int,
    score: str = "softmax",
    normalise: bool = True,
    selection_bias_E: Tensor | None = None,
    steps: Steps | None = None,
) -> Routing:
    """What `moevlm.ops.routing.top_k_routing` says, for float32 logits; `steps`: None chooses by device."""
    check_top_k(router_logits_TE, top_k)
    bias_E = None if selection_bias_E is None else selection_bias_E.float()
    logits_TE = router_logits_TE.contiguous()
    probs_TE, ids_TK, weights_TK = _Choose.apply(  # type: ignore[no-untyped-call]
        logits_TE, bias_E, top_k, score, normalise, steps or steps_for(router_logits_TE)
    )
    return Routing(router_logits_TE, probs_TE, ids_TK, weights_TK, num_balanced_choices=top_k)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, normalise: bool, steps: Steps
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs_TE, ids_TK, weights_TK = steps.choose(logits_TE, bias_E, top_k=top_k, score=score, normalise=normalise)
        ctx.mark_non_differentiable(ids_TK)
        ctx.save_for_backward(logits_TE, ids_TK, weights_TK)
        ctx.set_materialize_grads(False)
        ctx.score, ctx.normalise, ctx.steps = score, normalise, steps
        return probs_TE, ids_TK, weights_TK

    @staticmethod
    @once_differentiable  # type: ignore[misc, no-untyped-call]
    def backward(
        ctx: Any, probs_grad_TE: Tensor | None, _: None, weights_grad_TK: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if probs_grad_TE is None and weights_grad_TK is None:
            return None, None, None, None, None, None
        probs_grad_TE, weights_grad_TK = (
            None if grad is None else grad.contiguous() for grad in (probs_grad_TE, weights_grad_TK)
        )
        logits_grad_TE = ctx.steps.choose_backward(
            *ctx.saved_tensors, probs_grad_TE, weights_grad_TK, score=ctx.score, normalise=ctx.normalise
        )
        return logits_grad_TE, None, None, None, None, None
