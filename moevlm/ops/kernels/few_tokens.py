"""Triton: the routed SwiGLU of a few tokens, forward only: chosen experts' weights are read once, the others' never.

No count goes to the host, so a CUDA graph can hold it. A program takes one expert and some columns; one whose expert
was not chosen ends at once. An expert has at most T rows, since a token chooses it once: they fit into one tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_TOKENS = 64
COLUMNS, DEPTH = 16, 256  # of a tile of weights


@triton.jit
def _rows_of(expert, counts_ptr, num_experts, E: tl.constexpr):
    """First row and number of rows of an expert."""
    experts = tl.arange(0, E)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0)
    return tl.sum(tl.where(experts < expert, counts, 0)), tl.sum(tl.where(experts == expert, counts, 0))


@triton.jit
def _into(
    hidden_ptr, weights_ptr, gate_ptr, up_ptr, choice_of_row_ptr, counts_ptr, out_ptr, width, inner, num_experts,
    TOP_K: tl.constexpr, R: tl.constexpr, W: tl.constexpr, DEPTH: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start, count = _rows_of(expert, counts_ptr, num_experts, E)
    if count > 0:
        rows = tl.arange(0, R)
        columns = tl.program_id(0) * W + tl.arange(0, W)
        choices = tl.load(choice_of_row_ptr + start + rows, mask=rows < count, other=0)
        tokens = (choices // TOP_K).to(tl.int64)
        first_weight = expert.to(tl.int64) * inner * width
        gate = tl.zeros((R, W), dtype=tl.float32)
        up = tl.zeros((R, W), dtype=tl.float32)
        for first in range(0, width, DEPTH):
            depth = first + tl.arange(0, DEPTH)
            known = (rows < count)[:, None] & (depth < width)[None, :]
            hidden = tl.load(hidden_ptr + tokens[:, None] * width + depth[None, :], mask=known, other=0.0)
            places = first_weight + columns[None, :] * width + depth[:, None]
            known = (columns < inner)[None, :] & (depth < width)[:, None]
            gate = tl.dot(hidden, tl.load(gate_ptr + places, mask=known, other=0.0), gate, input_precision="ieee")
            up = tl.dot(hidden, tl.load(up_ptr + places, mask=known, other=0.0), up, input_precision="ieee")
        weights = tl.load(weights_ptr + choices, mask=rows < count, other=0.0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up * weights[:, None]
        places = (start + rows)[:, None] * inner + columns[None, :]
        known = (rows < count)[:, None] & (columns < inner)[None, :]
        tl.store(out_ptr + places, value.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _out_of(
    inner_ptr, down_ptr, counts_ptr, out_ptr, width, inner, num_experts,
    R: tl.constexpr, W: tl.constexpr, DEPTH: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start, count = _rows_of(expert, counts_ptr, num_experts, E)
    if count > 0:
        rows = tl.arange(0, R)
        columns = tl.program_id(0) * W + tl.arange(0, W)
        first_weight = expert.to(tl.int64) * inner * width
        total = tl.zeros((R, W), dtype=tl.float32)
        for first in range(0, inner, DEPTH):
            depth = first + tl.arange(0, DEPTH)
            known = (rows < count)[:, None] & (depth < inner)[None, :]
            value = tl.load(inner_ptr + (start + rows)[:, None] * inner + depth[None, :], mask=known, other=0.0)
            places = first_weight + columns[None, :].to(tl.int64) * inner + depth[:, None]
            known = (columns < width)[None, :] & (depth < inner)[:, None]
            total = tl.dot(value, tl.load(down_ptr + places, mask=known, other=0.0), total, input_precision="ieee")
        places = (start + rows)[:, None] * width + columns[None, :]
        known = (rows < count)[:, None] & (columns < width)[None, :]
        tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=known)


def few_token_rows(
    hidden_TD: Tensor,
    weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    choice_of_row_C: Tensor,
    counts_E: Tensor,
) -> Tensor:
    """See `moevlm.ops.plain_steps.few_token_rows`; at most `MOST_TOKENS` tokens."""
    (num_experts, inner, width), (num_tokens, top_k) = gate_EFD.shape, weights_TK.shape
    assert num_tokens <= MOST_TOKENS
    gate_EFD, up_EFD, down_EDF = gate_EFD.contiguous(), up_EFD.contiguous(), down_EDF.contiguous()
    inner_CF = torch.empty(num_tokens * top_k, inner, dtype=hidden_TD.dtype, device=hidden_TD.device)
    rows_CD = torch.empty(num_tokens * top_k, width, dtype=hidden_TD.dtype, device=hidden_TD.device)
    tile = {"R": max(16, triton.next_power_of_2(num_tokens)), "W": COLUMNS, "E": triton.next_power_of_2(num_experts)}
    tile["DEPTH"] = DEPTH if hidden_TD.dtype.itemsize == 2 else DEPTH // 2
    grid = (triton.cdiv(inner, COLUMNS), num_experts)
    _into[grid](
        hidden_TD, weights_TK, gate_EFD, up_EFD, choice_of_row_C, counts_E, inner_CF, width, inner, num_experts,
        TOP_K=top_k, **tile,
    )  # fmt: skip
    grid = (triton.cdiv(width, COLUMNS), num_experts)
    _out_of[grid](inner_CF, down_EDF, counts_E, rows_CD, width, inner, num_experts, **tile)
    return rows_CD
