"""Triton: the router's product with its weights, and the gradients, without a float32 copy of the tokens.

Products run in float32 accuracy on tensor cores: three TF32 products each (a bfloat16 token is exact in TF32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, COLUMNS = 32, 128  # of a tile
MOST_EXPERTS = 128
SPLIT_TOKENS = 256  # tokens of one partial sum of the weight's gradient


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, out_ptr, rounded_ptr, num_tokens, width, num_experts,
    ROUNDS: tl.constexpr, T: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * T + tl.arange(0, T)
    experts = tl.arange(0, E)
    total = tl.zeros((T, E), dtype=tl.float32)
    for first in range(0, width, W):
        columns = first + tl.arange(0, W)
        known = (tokens < num_tokens)[:, None] & (columns < width)[None, :]
        places = tokens[:, None].to(tl.int64) * width + columns[None, :]
        hidden = tl.load(hidden_ptr + places, mask=known, other=0.0).to(tl.float32)
        if ROUNDS:
            tl.store(rounded_ptr + places, hidden.to(rounded_ptr.dtype.element_ty), mask=known)
        places = experts[None, :] * width + columns[:, None]
        known = (experts < num_experts)[None, :] & (columns < width)[:, None]
        weight = tl.load(weight_ptr + places, mask=known, other=0.0)
        total = tl.dot(hidden, weight, total, input_precision="tf32x3")
    places = tokens[:, None] * num_experts + experts[None, :]
    tl.store(out_ptr + places, total, mask=(tokens < num_tokens)[:, None] & (experts < num_experts)[None, :])


@triton.jit
def _hidden_grad(
    passed_ptr, logits_grad_ptr, weight_ptr, out_ptr, num_tokens, width, num_experts,
    HAS_PASSED: tl.constexpr, T: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * T + tl.arange(0, T)
    columns = tl.program_id(1) * W + tl.arange(0, W)
    experts = tl.arange(0, E)
    places = tokens[:, None] * num_experts + experts[None, :]
    known = (tokens < num_tokens)[:, None] & (experts < num_experts)[None, :]
    logits_grad = tl.load(logits_grad_ptr + places, mask=known, other=0.0)
    places = experts[:, None] * width + columns[None, :]
    known = (experts < num_experts)[:, None] & (columns < width)[None, :]
    weight = tl.load(weight_ptr + places, mask=known, other=0.0)
    total = tl.dot(logits_grad, weight, input_precision="tf32x3")
    places = tokens[:, None].to(tl.int64) * width + columns[None, :]
    known = (tokens < num_tokens)[:, None] & (columns < width)[None, :]
    if HAS_PASSED:
        total += tl.load(passed_ptr + places, mask=known, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _weight_grad(
    hidden_ptr, logits_grad_ptr, partial_ptr, num_tokens, width, num_experts,
    SPLIT: tl.constexpr, T: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    columns = tl.program_id(1) * W + tl.arange(0, W)
    experts = tl.arange(0, E)
    total = tl.zeros((E, W), dtype=tl.float32)
    for first in range(0, SPLIT, T):
        tokens = split * SPLIT + first + tl.arange(0, T)
        places = tokens[None, :] * num_experts + experts[:, None]
        known = (tokens < num_tokens)[None, :] & (experts < num_experts)[:, None]
        logits_grad = tl.load(logits_grad_ptr + places, mask=known, other=0.0)
        places = tokens[:, None].to(tl.int64) * width + columns[None, :]
        known = (tokens < num_tokens)[:, None] & (columns < width)[None, :]
        hidden = tl.load(hidden_ptr + places, mask=known, other=0.0).to(tl.float32)
        total = tl.dot(logits_grad, hidden, total, input_precision="tf32x3")
    places = (split * num_experts + experts[:, None]) * width + columns[None, :]
    tl.store(partial_ptr + places, total, mask=(experts < num_experts)[:, None] & (columns < width)[None, :])


def router_logits(hidden_TD: Tensor, weight_ED: Tensor, rounded_TD: Tensor | None = None) -> Tensor:
    """See `moevlm.ops.plain_steps.router_logits`."""
    num_tokens, num_experts, width = *hidden_TD.shape[:1], *weight_ED.shape
    out_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=hidden_TD.device)
    if num_tokens:
        tile = {"T": TOKENS, "W": COLUMNS, "E": _padded(num_experts)}
        grid = (triton.cdiv(num_tokens, TOKENS),)
        rounded = out_TE if rounded_TD is None else rounded_TD
        _logits[grid](
            hidden_TD, weight_ED, out_TE, rounded, num_tokens, width, num_experts,
            ROUNDS=rounded_TD is not None, **tile,
        )  # fmt: skip
    return out_TE


def router_hidden_grad(
    logits_grad_TE: Tensor, weight_ED: Tensor, passed_TD: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `moevlm.ops.plain_steps.router_hidden_grad`."""
    num_tokens, num_experts, width = *logits_grad_TE.shape[:1], *weight_ED.shape
    out_TD = torch.empty(num_tokens, width, dtype=dtype, device=weight_ED.device)
    if num_tokens:
        tile = {"T": TOKENS, "W": COLUMNS, "E": _padded(num_experts)}
        grid = (triton.cdiv(num_tokens, TOKENS), triton.cdiv(width, COLUMNS))
        passed = out_TD if passed_TD is None else passed_TD
        _hidden_grad[grid](
            passed, logits_grad_TE, weight_ED, out_TD, num_tokens, width, num_experts,
            HAS_PASSED=passed_TD is not None, **tile,
        )  # fmt: skip
    return out_TD


def router_weight_grad(logits_grad_TE: Tensor, hidden_TD: Tensor) -> Tensor:
    """See `moevlm.ops.plain_steps.router_weight_grad`."""
    (num_tokens, num_experts), width = logits_grad_TE.shape, hidden_TD.shape[1]
    num_splits = triton.cdiv(num_tokens, SPLIT_TOKENS)
    partial_SED = torch.empty(num_splits, num_experts, width, dtype=torch.float32, device=hidden_TD.device)
    if num_tokens:
        tile = {"T": TOKENS, "W": COLUMNS, "E": _padded(num_experts)}
        grid = (num_splits, triton.cdiv(width, COLUMNS))
        _weight_grad[grid](
            hidden_TD, logits_grad_TE, partial_SED, num_tokens, width, num_experts, SPLIT=SPLIT_TOKENS, **tile
        )
    return partial_SED.sum(dim=0)


def _padded(num_experts: int) -> int:
    """Tensor cores take 16 rows at least."""
    return max(16, triton.next_power_of_2(num_experts))
