"""Triton: copies of tokens as rows, and sums of rows as tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # of one program
MOST_COLUMNS = 2048


@triton.jit
def _gather(
    source_ptr, choice_of_row_ptr, out_ptr, num_rows, width, TOP_K: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.program_id(1) * W + tl.arange(0, W)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    tokens = tl.load(choice_of_row_ptr + rows, mask=rows < num_rows, other=0) // TOP_K
    values = tl.load(source_ptr + tokens[:, None].to(tl.int64) * width + columns[None, :], mask=inside)
    tl.store(out_ptr + rows[:, None].to(tl.int64) * width + columns[None, :], values, mask=inside)


@triton.jit
def _sum(
    rows_ptr, row_of_choice_ptr, out_ptr, num_tokens, width, TOP_K: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    tokens = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.program_id(1) * W + tl.arange(0, W)
    inside = (tokens < num_tokens)[:, None] & (columns < width)[None, :]
    total = tl.zeros((R, W), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        rows = tl.load(row_of_choice_ptr + tokens * TOP_K + k, mask=tokens < num_tokens, other=-1)
        places = tl.maximum(rows, 0)[:, None].to(tl.int64) * width + columns[None, :]
        total += tl.load(rows_ptr + places, mask=inside & (rows >= 0)[:, None], other=0.0).to(tl.float32)
    places = tokens[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)


def gather_rows(source_TD: Tensor, choice_of_row_R: Tensor, out_RD: Tensor, *, top_k: int) -> None:
    """See `moevlm.ops.plain_steps.gather_rows`."""
    assert source_TD.is_contiguous()
    assert out_RD.is_contiguous()
    num_rows, width = out_RD.shape
    if num_rows:
        block = min(MOST_COLUMNS, triton.next_power_of_2(width))
        grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(width, block))
        _gather[grid](source_TD, choice_of_row_R, out_RD, num_rows, width, TOP_K=top_k, R=ROWS, W=block)


def sum_rows(rows_MD: Tensor, row_of_choice_TK: Tensor) -> Tensor:
    """See `moevlm.ops.plain_steps.sum_rows`."""
    assert rows_MD.is_contiguous()
    num_tokens, top_k = row_of_choice_TK.shape
    width = rows_MD.shape[1]
    out_TD = torch.empty(num_tokens, width, dtype=rows_MD.dtype, device=rows_MD.device)
    if num_tokens:
        block = min(MOST_COLUMNS, triton.next_power_of_2(width))
        grid = (triton.cdiv(num_tokens, ROWS), triton.cdiv(width, block))
        _sum[grid](rows_MD, row_of_choice_TK, out_TD, num_tokens, width, TOP_K=top_k, R=ROWS, W=block)
    return out_TD
