"""Triton: weighted SwiGLU, forward and backward in one pass each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 2048


@triton.jit
def _forward(gate_ptr, up_ptr, weights_ptr, choice_of_row_ptr, out_ptr, width, W: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * W + tl.arange(0, W)
    inside = columns < width
    places = row.to(tl.int64) * width + columns
    weight = tl.load(weights_ptr + tl.load(choice_of_row_ptr + row)).to(tl.float32)
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight
    tl.store(out_ptr + places, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate_ptr, up_ptr, weights_ptr, choice_of_row_ptr, grad_ptr, out_ptr, gate_grad_ptr, up_grad_ptr, weights_grad_ptr,
    width, W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    choice = tl.load(choice_of_row_ptr + row)
    weight = tl.load(weights_ptr + choice).to(tl.float32)
    dot = tl.zeros((W,), dtype=tl.float32)
    for first in range(0, width, W):
        columns = first + tl.arange(0, W)
        inside = columns < width
        places = row.to(tl.int64) * width + columns
        gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + places, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + places, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dot += grad * silu * up
        grad *= weight
        tl.store(out_ptr + places, (silu * up * weight).to(out_ptr.dtype.element_ty), mask=inside)
        gate_grad = grad * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(gate_grad_ptr + places, gate_grad.to(gate_grad_ptr.dtype.element_ty), mask=inside)
        tl.store(up_grad_ptr + places, (grad * silu).to(up_grad_ptr.dtype.element_ty), mask=inside)
    tl.store(weights_grad_ptr + choice, tl.sum(dot, axis=0))


def swiglu(gate_RF: Tensor, up_RF: Tensor, weights_TK: Tensor, choice_of_row_R: Tensor, out_RF: Tensor) -> None:
    """See `moevlm.ops.plain_steps.swiglu`."""
    assert gate_RF.is_contiguous()
    assert up_RF.is_contiguous()
    assert out_RF.is_contiguous()
    num_rows, width = gate_RF.shape
    if num_rows:
        block = min(MOST_COLUMNS, triton.next_power_of_2(width))
        grid = (num_rows, triton.cdiv(width, block))
        _forward[grid](gate_RF, up_RF, weights_TK, choice_of_row_R, out_RF, width, W=block, num_warps=_warps(block))


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
    """See `moevlm.ops.plain_steps.swiglu_backward`."""
    for tensor in (gate_RF, up_RF, grad_RF, out_RF, up_grad_RF):
        assert tensor.is_contiguous()
    num_rows, width = gate_RF.shape
    if num_rows:
        block = min(MOST_COLUMNS, triton.next_power_of_2(width))
        _backward[(num_rows,)](
            gate_RF, up_RF, weights_TK, choice_of_row_R, grad_RF, out_RF, grad_RF, up_grad_RF, weights_grad_TK, width,
            W=block, num_warps=_warps(block),
        )  # fmt: skip


def _warps(block: int) -> int:
    """Eight numbers a thread: loads of 16 bytes in bfloat16."""
    return max(1, min(8, block // 256))
