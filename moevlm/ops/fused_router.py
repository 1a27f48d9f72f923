"""The router's product in float32 without a float32 copy of the tokens, forward or backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moevlm.ops.steps import Steps, steps_for


def router_logits(
    hidden_TD: Tensor, weight_ED: Tensor, *, dtype: torch.dtype | None = None, steps: Steps | None = None
) -> tuple[Tensor, Tensor]:
    """``hidden @ weight.T`` in float32, and the tokens once more.

    Experts take the tokens that this returns: their gradient then comes back through here, and one pass adds the
    router's own to it. Under autocast they are rounded in the pass that makes the logits (from unrounded tokens).

    Args:
        weight_ED: float32.
        dtype: of the tokens returned; None leaves them.
        steps: None chooses by device.

    Returns:
        [T, E] float32, and `hidden_TD`.
    """
    options = (dtype or hidden_TD.dtype, steps or steps_for(hidden_TD))
    return _RouterLogits.apply(hidden_TD.contiguous(), weight_ED.contiguous(), *options)  # type: ignore[no-any-return, no-untyped-call]


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype, steps: Steps
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_TD, weight_ED)
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        if dtype == hidden_TD.dtype:
            return steps.router_logits(hidden_TD, weight_ED), hidden_TD.view_as(hidden_TD)
        rounded_TD = torch.empty_like(hidden_TD, dtype=dtype)
        return steps.router_logits(hidden_TD, weight_ED, rounded_TD=rounded_TD), rounded_TD

    @staticmethod
    @once_differentiable  # type: ignore[misc, no-untyped-call]
    def backward(
        ctx: Any, logits_grad_TE: Tensor | None, passed_TD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_TD, weight_ED = ctx.saved_tensors
        if logits_grad_TE is None:
            return None if passed_TD is None else passed_TD.to(hidden_TD.dtype), None, None, None
        logits_grad_TE = logits_grad_TE.contiguous()
        hidden_grad_TD, weight_grad_ED = None, None
        if ctx.needs_input_grad[0]:
            passed_TD = None if passed_TD is None else passed_TD.contiguous()
            hidden_grad_TD = ctx.steps.router_hidden_grad(logits_grad_TE, weight_ED, passed_TD, hidden_TD.dtype)
        if ctx.needs_input_grad[1]:
            weight_grad_ED = ctx.steps.router_weight_grad(logits_grad_TE, hidden_TD)
        return hidden_grad_TD, weight_grad_ED, None, None
