"""The routed SwiGLU feed-forward by grouped products: many experts with few rows each, and no word to the host.

The same passes as `moevlm.ops.routed_ffn`; all experts' products are one kernel, which reads where each one's rows end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from moevlm.ops.steps import Steps

# What was measured to win (docs/performance.md); between this and few experts with many rows nobody has looked yet.
MOST_ROWS = 1024  # of an expert, on average
FEWEST_EXPERTS = 64


def prefers_grouped(hidden_TD: Tensor, gate_EFD: Tensor, *, top_k: int) -> bool:
    """Whether grouped products win: few rows for each of many experts, in bfloat16, on a GPU from Hopper on."""
    num_experts, inner, width = gate_EFD.shape
    return (
        hidden_TD.is_cuda
        and num_experts >= FEWEST_EXPERTS
        and hidden_TD.shape[0] * top_k <= MOST_ROWS * num_experts
        and hidden_TD.dtype == torch.bfloat16
        and inner % 8 == width % 8 == 0  # rows of 16 bytes
        and torch.cuda.get_device_capability(hidden_TD.device)[0] >= 9
    )


class GroupedSwiGLU(torch.autograd.Function):
    """Every choice has a row: nothing may be dropped, since the host does not know how many rows there are."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        row_of_choice_TK: Tensor,
        choice_of_row_M: Tensor,
        counts_E: Tensor,
        steps: Steps,
    ) -> Tensor:
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        rows_MD = _gathered(steps, hidden_TD, choice_of_row_M, weights_TK.shape[1])
        gate_MF = grouped_mm(rows_MD, gate_EFD.mT, offs=ends_E)
        up_MF = grouped_mm(rows_MD, up_EFD.mT, offs=ends_E)
        del rows_MD
        inner_MF = torch.empty_like(gate_MF)
        steps.swiglu(gate_MF, up_MF, weights_TK, choice_of_row_M, inner_MF)
        ctx.save_for_backward(
            hidden_TD, weights_TK, gate_EFD, up_EFD, down_EDF, row_of_choice_TK, choice_of_row_M, ends_E, gate_MF, up_MF
        )
        ctx.steps = steps
        return steps.sum_rows(grouped_mm(inner_MF, down_EDF.mT, offs=ends_E), row_of_choice_TK)

    @staticmethod
    @once_differentiable  # type: ignore[misc, no-untyped-call]
    def backward(ctx: Any, output_grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weights_TK, gate_EFD, up_EFD, down_EDF, row_of_choice_TK, choices_M, ends_E, gate_MF, up_MF = (
            ctx.saved_tensors
        )
        steps, (wants_hidden, _, wants_gate, wants_up, wants_down, *_) = ctx.steps, ctx.needs_input_grad
        hidden_grad_TD = gate_grad = up_grad = down_grad = None
        weights_grad_TK = torch.zeros_like(weights_TK, dtype=torch.float32)
        rows_MD = _gathered(steps, output_grad_TD.contiguous(), choices_M, weights_TK.shape[1])
        grad_MF = grouped_mm(rows_MD, down_EDF, offs=ends_E)
        inner_MF, up_grad_MF = torch.empty_like(gate_MF), torch.empty_like(up_MF)
        steps.swiglu_backward(
            gate_MF, up_MF, weights_TK, choices_M, grad_MF,
            out_RF=inner_MF, up_grad_RF=up_grad_MF, weights_grad_TK=weights_grad_TK,
        )  # fmt: skip
        if wants_down:
            down_grad = grouped_mm(rows_MD.T, inner_MF, offs=ends_E)
        del rows_MD, inner_MF
        if wants_hidden:
            rows_grad_MD = grouped_mm(grad_MF, gate_EFD, offs=ends_E)
            rows_grad_MD += grouped_mm(up_grad_MF, up_EFD, offs=ends_E)
            hidden_grad_TD = steps.sum_rows(rows_grad_MD, row_of_choice_TK)
            del rows_grad_MD
        if wants_gate or wants_up:
            rows_MD = _gathered(steps, hidden_TD, choices_M, weights_TK.shape[1])
            gate_grad = grouped_mm(grad_MF.T, rows_MD, offs=ends_E) if wants_gate else None
            up_grad = grouped_mm(up_grad_MF.T, rows_MD, offs=ends_E) if wants_up else None
        weights_grad_TK = weights_grad_TK.to(weights_TK.dtype)
        return hidden_grad_TD, weights_grad_TK, gate_grad, up_grad, down_grad, None, None, None, None


def _gathered(steps: Steps, source_TD: Tensor, choices_M: Tensor, top_k: int) -> Tensor:
    rows_MD = source_TD.new_empty(choices_M.shape[0], source_TD.shape[1])
    steps.gather_rows(source_TD, choices_M, rows_MD, top_k=top_k)
    return rows_MD
