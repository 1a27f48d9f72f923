"""The routed SwiGLU feed-forward of a sparse layer with a backward written by hand: no buffer lives that need not.

Forward: sort the choices, copy each token to the rows of its experts, and per expert three products and one pass of
weighted SwiGLU; add each token's rows up. Kept for the backward: tokens, gate and up. Backward: the activation is
made again in the pass that makes the gradients of gate, up and the weights; buffers are those of one expert at a time.
The products are cuBLAS's, expert by expert, from and into slices; the host reads the counts once, while the tokens are
copied. cuBLAS takes longer to choose a kernel for a number of rows it has not met than to run it, and routing brings
new numbers in every step, so each product takes its rows up to the next multiple of `ROW_STEP`: what a product writes
behind its expert's rows is written over by the next expert, and what a sum over rows would take in is zero.
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
ROW_STEP = 128  # rows of a tile of a product on a GPU: a part of a tile takes as long as a whole one


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
    row_step: int | None = None,
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
        row_step: the rows of every product are a multiple of this; None: `ROW_STEP` on a GPU, else 1.

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
    row_step = row_step or (ROW_STEP if hidden_TD.is_cuda else 1)
    order = _Order(row_of_choice_TK, choice_of_row_C, _begin_read(counts_E), row_step)
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
    row_step: int


class _Span(NamedTuple):
    """The rows of one expert."""

    expert: int
    start: int
    num_rows: int
    step: int

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + self.num_rows)

    @property
    def whole(self) -> slice:
        """Its rows and those up to the next multiple: the next expert's, or rows behind the last."""
        return slice(self.start, self.start + self.num_whole)

    @property
    def num_whole(self) -> int:
        return -(-self.num_rows // self.step) * self.step


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
        top_k, width, inner, step = weights_TK.shape[1], hidden_TD.shape[1], gate_EFD.shape[1], order.row_step
        num_choices = weights_TK.numel()
        rows_CD = hidden_TD.new_empty(num_choices + step - 1, width)
        steps.gather_rows(hidden_TD, order.choice_of_row, rows_CD[:num_choices], top_k=top_k)  # while the counts travel
        counts = order.read_counts()
        spans = list(_spans(counts, step))
        choice_of_row_M = order.choice_of_row[: sum(counts)]
        # what a product may write into: the tokens' copies are no such place while the next expert needs them
        output_CD = rows_CD if step == 1 else torch.empty_like(rows_CD)
        most_rows = max((span.num_whole for span in spans), default=0)
        kept_rows = len(choice_of_row_M) + step - 1 if keeps else most_rows
        gate_MF, up_MF = (hidden_TD.new_empty(kept_rows, inner) for _ in range(2))
        inner_RF = hidden_TD.new_empty(most_rows, inner)
        for span in spans:
            e, place = span.expert, span.whole if keeps else slice(0, span.num_whole)
            gate_RF, up_RF = gate_MF[place], up_MF[place]
            torch.mm(rows_CD[span.whole], gate_EFD[e].T, out=gate_RF)
            torch.mm(rows_CD[span.whole], up_EFD[e].T, out=up_RF)
            own = slice(0, span.num_rows)
            steps.swiglu(gate_RF[own], up_RF[own], weights_TK, choice_of_row_M[span.own], inner_RF[own])
            torch.mm(inner_RF[: span.num_whole], down_EDF[e].T, out=output_CD[span.whole])
        ctx.save_for_backward(
            hidden_TD, weights_TK, gate_EFD, up_EFD, down_EDF, order.row_of_choice, choice_of_row_M, gate_MF, up_MF
        )
        ctx.counts, ctx.row_step, ctx.steps = counts, step, steps
        return steps.sum_rows(output_CD, order.row_of_choice)

    @staticmethod
    @once_differentiable  # type: ignore[misc, no-untyped-call]
    def backward(ctx: Any, output_grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weights_TK, gate_EFD, up_EFD, down_EDF, row_of_choice_TK, choice_of_row_M, gate_MF, up_MF = (
            ctx.saved_tensors
        )
        counts, row_step, steps = ctx.counts, ctx.row_step, ctx.steps
        wants_hidden, _, wants_gate, wants_up, wants_down, *_ = ctx.needs_input_grad
        top_k, num_rows, (width, inner) = weights_TK.shape[1], gate_MF.shape[0], down_EDF.shape[1:]
        output_grad_TD = output_grad_TD.contiguous()
        weights_grad_TK = torch.zeros_like(weights_TK, dtype=torch.float32)
        gate_grad, up_grad, down_grad = (
            _empty_experts(weight, counts) if wants else None
            for weight, wants in ((gate_EFD, wants_gate), (up_EFD, wants_up), (down_EDF, wants_down))
        )
        rows_grad_MD = hidden_TD.new_empty(num_rows if wants_hidden else 0, width)
        spans = list(_spans(counts, row_step))
        most_rows = max((span.num_whole for span in spans), default=0)
        grad_XF, inner_XF, up_grad_XF = (hidden_TD.new_empty(most_rows, inner) for _ in range(3))
        rows_XD = hidden_TD.new_empty(most_rows, width)
        # what sums over rows meets zeros behind an expert's own in rows_XD; in the others anything finite will do
        fewest_rows = min((span.num_rows for span in spans), default=0)
        for buffer in (inner_XF, up_grad_XF) if row_step > 1 else ():
            buffer[fewest_rows:].zero_()
        for span in spans:
            e, own, whole = span.expert, slice(0, span.num_rows), slice(0, span.num_whole)
            grad_RF, inner_RF, up_grad_RF, rows_RD = (x[whole] for x in (grad_XF, inner_XF, up_grad_XF, rows_XD))
            rows_RD[span.num_rows :].zero_()
            choices_R = choice_of_row_M[span.own]
            steps.gather_rows(output_grad_TD, choices_R, rows_RD[own], top_k=top_k)
            torch.mm(rows_RD, down_EDF[e], out=grad_RF)
            steps.swiglu_backward(
                gate_MF[span.own], up_MF[span.own], weights_TK, choices_R, grad_RF[own],
                out_RF=inner_RF[own], up_grad_RF=up_grad_RF[own], weights_grad_TK=weights_grad_TK,
            )  # fmt: skip
            if down_grad is not None:
                torch.mm(rows_RD.T, inner_RF, out=down_grad[e])
            if wants_hidden:
                torch.mm(grad_RF, gate_EFD[e], out=rows_grad_MD[span.whole])
                rows_grad_MD[span.whole].addmm_(up_grad_RF, up_EFD[e])
            if gate_grad is not None or up_grad is not None:
                steps.gather_rows(hidden_TD, choices_R, rows_RD[own], top_k=top_k)
            if gate_grad is not None:
                torch.mm(grad_RF.T, rows_RD, out=gate_grad[e])
            if up_grad is not None:
                torch.mm(up_grad_RF.T, rows_RD, out=up_grad[e])
        del grad_XF, inner_XF, up_grad_XF, rows_XD
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


def _spans(counts: Sequence[int], step: int) -> Iterator[_Span]:
    """Those of the experts that have rows."""
    ends = itertools.accumulate(counts)
    return (_Span(e, end - count, count, step) for e, (count, end) in enumerate(zip(counts, ends)) if count)


def _empty_experts(weight_EIO: Tensor, counts: Sequence[int]) -> Tensor:
    """A gradient to be written expert by expert; zero for the experts without a row."""
    grad = torch.empty_like(weight_EIO, memory_format=torch.contiguous_format)
    for expert, count in enumerate(counts):
        if count == 0:
            grad[expert].zero_()
    return grad
