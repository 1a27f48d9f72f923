"""The routed SwiGLU feed-forward of a sparse layer with a backward written by hand: no buffer lives that need not.

Forward: sort the choices, copy each token to the rows of its experts, and per expert three products and one pass of
weighted SwiGLU; add each token's rows up. Kept for the backward: tokens, gate and up. Backward: the activation is
made again in the pass that makes the gradients of gate, up and the weights; buffers are those of one expert at a time.
The products are cuBLAS's, expert by expert, from and into slices; the host reads the counts once, while the tokens are
copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moevlm.ops.decode import MAX_ROWS, Choices, gated_ffn
from moevlm.ops.grouped_ffn import GroupedSwiGLU, prefers_grouped
from moevlm.ops.steps import Steps, steps_for

MOST_EXPERTS = 128  # tiles of the kernels hold a number for each


class SwiGLUExperts(NamedTuple):
    """Weights of E SwiGLU networks without biases: ``down(silu(gate(x)) * up(x))``."""

    gate: Tensor  # [E, F, D]
    up: Tensor  # [E, F, D]
    down: Tensor  # [E, D, F]


def routed_swiglu(
    hidden_TD: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    experts: SwiGLUExperts,
    *,
    dropped_TK: Tensor | None = None,
    steps: Steps | None = None,
    grouped: bool | None = None,
) -> Tensor:
    """``y_t = sum over k of weight_tk * expert_{id_tk}(x_t)`` (arXiv:1701.06538, Eq. 1; experts: arXiv:2002.05202).

    The weight multiplies the activation instead of the output, where it needs no pass of its own; sums over experts
    and of the weights' gradient run in float32. A few tokens without gradient take the kernels of generation, which
    read the chosen experts' weights alone.

    Args:
        hidden_TD: in the dtype of the experts.
        dropped_TK: choices that add nothing; None: every choice counts.
        steps: None chooses by device.
        grouped: one product for all experts, where nothing is dropped; None chooses by sizes, see `prefers_grouped`.

    Returns:
        [T, D] in the dtype of `hidden_TD`; gradients flow to tokens, weights and experts, to those that want one.
    """
    keeps = torch.is_grad_enabled() and any(one.requires_grad for one in (hidden_TD, expert_weights_TK, *experts))
    if not keeps and 0 < hidden_TD.shape[0] <= MAX_ROWS:
        return _few_tokens(hidden_TD, expert_ids_TK, expert_weights_TK, experts, dropped_TK)
    steps = steps or steps_for(hidden_TD)
    row_of_choice_TK, choice_of_row_C, counts_E = steps.sort_choices(
        expert_ids_TK, dropped_TK, num_experts=experts.gate.shape[0]
    )
    if grouped is None:
        grouped = prefers_grouped(hidden_TD, experts.gate, top_k=expert_ids_TK.shape[1])
    if grouped and dropped_TK is None:
        return GroupedSwiGLU.apply(  # type: ignore[no-any-return, no-untyped-call]
            hidden_TD.contiguous(), expert_weights_TK.contiguous(), *experts,
            row_of_choice_TK, choice_of_row_C, counts_E, steps,
        )  # fmt: skip
    order = _Order(row_of_choice_TK, choice_of_row_C, _begin_read(counts_E))
    return _RoutedSwiGLU.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden_TD.contiguous(), expert_weights_TK.contiguous(), *experts, order, steps, keeps
    )


def _few_tokens(
    hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: SwiGLUExperts, dropped_TK: Tensor | None
) -> Tensor:
    ids_TK = ids_TK if dropped_TK is None else ids_TK.masked_fill(dropped_TK, -1)
    gate_EFD, up_EFD, down_EDF = (weight.contiguous() for weight in experts)
    choices = Choices(ids_TK.int().contiguous(), weights_TK.contiguous())
    return gated_ffn(hidden_TD.contiguous(), gate_EFD, up_EFD, down_EDF, choices)


class _Order(NamedTuple):
    row_of_choice: Tensor  # [T, K] int32
    choice_of_row: Tensor  # [T * K] int32
    read_counts: Callable[[], list[int]]


class _RoutedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        order: _Order,
        steps: Steps,
        keeps: bool,
    ) -> Tensor:
        top_k, width, inner = weights_TK.shape[1], hidden_TD.shape[1], gate_EFD.shape[1]
        rows_CD = hidden_TD.new_empty(weights_TK.numel(), width)
        steps.gather_rows(hidden_TD, order.choice_of_row, rows_CD, top_k=top_k)  # while the counts travel to the host
        counts = order.read_counts()
        num_rows = sum(counts)
        rows_MD, choice_of_row_M = rows_CD[:num_rows], order.choice_of_row[:num_rows]
        most_rows = max(counts, default=0)
        gate_MF, up_MF = (hidden_TD.new_empty(num_rows if keeps else most_rows, inner) for _ in range(2))
        inner_MF = hidden_TD.new_empty(most_rows, inner)
        for e, span in _spans(counts):
            place = span if keeps else slice(0, counts[e])
            gate_RF, up_RF, inner_RF = gate_MF[place], up_MF[place], inner_MF[: counts[e]]
            torch.mm(rows_MD[span], gate_EFD[e].T, out=gate_RF)
            torch.mm(rows_MD[span], up_EFD[e].T, out=up_RF)
            steps.swiglu(gate_RF, up_RF, weights_TK, choice_of_row_M[span], inner_RF)
            torch.mm(inner_RF, down_EDF[e].T, out=rows_MD[span])  # the tokens' copies are not needed again
        ctx.save_for_backward(
            hidden_TD, weights_TK, gate_EFD, up_EFD, down_EDF, order.row_of_choice, choice_of_row_M, gate_MF, up_MF
        )
        ctx.counts, ctx.steps = counts, steps
        return steps.sum_rows(rows_MD, order.row_of_choice)

    @staticmethod
    @once_differentiable  # type: ignore[misc, no-untyped-call]
    def backward(ctx: Any, output_grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weights_TK, gate_EFD, up_EFD, down_EDF, row_of_choice_TK, choice_of_row_M, gate_MF, up_MF = (
            ctx.saved_tensors
        )
        counts, steps = ctx.counts, ctx.steps
        wants_hidden, _, wants_gate, wants_up, wants_down, *_ = ctx.needs_input_grad
        top_k, num_rows = weights_TK.shape[1], gate_MF.shape[0]
        output_grad_TD = output_grad_TD.contiguous()
        weights_grad_TK = torch.zeros_like(weights_TK, dtype=torch.float32)
        gate_grad, up_grad, down_grad = (
            _empty_experts(weight, counts) if wants else None
            for weight, wants in ((gate_EFD, wants_gate), (up_EFD, wants_up), (down_EDF, wants_down))
        )
        rows_grad_MD = hidden_TD.new_empty(num_rows if wants_hidden else 0, hidden_TD.shape[1])
        wide = [hidden_TD.new_empty(max(counts, default=0), gate_EFD.shape[1]) for _ in range(3)]
        narrow = hidden_TD.new_empty(max(counts, default=0), hidden_TD.shape[1])
        for e, span in _spans(counts):
            grad_RF, inner_RF, up_grad_RF = (buffer[: counts[e]] for buffer in wide)
            choices_R, rows_RD = choice_of_row_M[span], narrow[: counts[e]]
            steps.gather_rows(output_grad_TD, choices_R, rows_RD, top_k=top_k)
            torch.mm(rows_RD, down_EDF[e], out=grad_RF)
            steps.swiglu_backward(
                gate_MF[span], up_MF[span], weights_TK, choices_R, grad_RF,
                out_RF=inner_RF, up_grad_RF=up_grad_RF, weights_grad_TK=weights_grad_TK,
            )  # fmt: skip
            if down_grad is not None:
                torch.mm(rows_RD.T, inner_RF, out=down_grad[e])
            if wants_hidden:
                torch.mm(grad_RF, gate_EFD[e], out=rows_grad_MD[span])
                rows_grad_MD[span].addmm_(up_grad_RF, up_EFD[e])
            if gate_grad is not None or up_grad is not None:
                steps.gather_rows(hidden_TD, choices_R, rows_RD, top_k=top_k)
            if gate_grad is not None:
                torch.mm(grad_RF.T, rows_RD, out=gate_grad[e])
            if up_grad is not None:
                torch.mm(up_grad_RF.T, rows_RD, out=up_grad[e])
        del wide, narrow
        hidden_grad_TD = steps.sum_rows(rows_grad_MD, row_of_choice_TK) if wants_hidden else None
        return hidden_grad_TD, weights_grad_TK.to(weights_TK.dtype), gate_grad, up_grad, down_grad, None, None, None


def _begin_read(counts_E: Tensor) -> Callable[[], list[int]]:
    """Start to copy the counts to the host; the function returned waits for that copy alone, not for later work."""
    if not counts_E.is_cuda:
        return counts_E.tolist
    pinned_E = torch.empty(counts_E.shape, dtype=counts_E.dtype, pin_memory=True)
    pinned_E.copy_(counts_E, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        return pinned_E.tolist()

    return read


def _spans(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and their rows."""
    ends = itertools.accumulate(counts)
    return ((e, slice(end - count, end)) for e, (count, end) in enumerate(zip(counts, ends)) if count)


def _empty_experts(weight_EIO: Tensor, counts: Sequence[int]) -> Tensor:
    """A gradient to be written expert by expert; zero for the experts without a row."""
    grad = torch.empty_like(weight_EIO, memory_format=torch.contiguous_format)
    for expert, count in enumerate(counts):
        if count == 0:
            grad[expert].zero_()
    return grad
