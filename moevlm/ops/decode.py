"""One decode step's maps on 1 to 64 tokens: norm + linear, routing, experts, attention over a preallocated cache.

Inference only: nothing here has a gradient. Nothing synchronises with the host, shapes do not depend on what the router
chooses, and only the chosen experts' weights are read, so that a step can be captured in a CUDA graph. On CUDA the
kernels of `moevlm.ops.kernels` run; elsewhere, and with `plain=True`, the same in PyTorch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moevlm.ops.routing import top_k_routing

MAX_ROWS = 64


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on tensors of this device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


class Blocks(NamedTuple):
    """Tile of a weight matrix that a program holds at a time, and how many loads are in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


SINGLE = {
    "linear": Blocks(8, 512, 4, 3),
    "few_rows": Blocks(2, 1024, 4, 1),
    "gate_up": Blocks(8, 512, 4, 3),
    "down": Blocks(4, 512, 4, 5),
}
SEVERAL = {
    "linear": Blocks(64, 128, 8, 3),
    "few_rows": Blocks(16, 256, 4, 5),
    "gate_up": Blocks(64, 64, 4, 3),
    "down": Blocks(16, 256, 4, 5),
}
"""Blocks for one token and for more, by kernel; the fastest of a few dozen on an H200 (docs/performance.md)."""
FEW_ROWS = 4096  # a matrix of fewer rows is cut finer, or it would not fill the chip


def rms_norm(x_BD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` (arXiv:1910.07467, Eq. 4), in float32, rounded before the product."""
    x32_BD = x_BD.float()
    scaled_BD = x32_BD * torch.rsqrt(x32_BD.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * scaled_BD.to(x_BD.dtype)


def linear(
    x_BD: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm_D: Tensor | None = None,
    eps: float = 0.0,
    residual_BN: Tensor | None = None,
    dtype: torch.dtype | None = None,
    plain: bool = False,
) -> Tensor:
    """``norm(x) [W_1; W_2; ...]^T + bias + residual``.

    Args:
        weights: one matrix or three, [N_i, D] each, contiguous.
        biases: one for each matrix, all None or none of them.
        norm_D: weight of the RMSNorm before; None for no norm.
        dtype: of the result; None: that of `x_BD`.
        plain: take PyTorch's own functions on any device.

    Returns:
        [B, sum N_i].
    """
    assert len(weights) in (1, 3)
    assert len(weights) == len(biases)
    if plain or not has_kernels(x_BD.device):
        normed_BD = x_BD if norm_D is None else rms_norm(x_BD, norm_D, eps)
        parts = [torch.nn.functional.linear(normed_BD, *pair) for pair in zip(weights, biases)]
        y_BN = torch.cat(parts, dim=-1)
        return (y_BN if residual_BN is None else residual_BN + y_BN).to(dtype or x_BD.dtype)
    from moevlm.ops.kernels.decode import linear_kernel

    sizes = [weight.shape[0] for weight in weights]
    out_BN = x_BD.new_empty(x_BD.shape[0], sum(sizes), dtype=dtype)
    rows, blocks = _tile("few_rows" if sum(sizes) < FEW_ROWS else "linear", x_BD)
    filled = [*weights, *[weights[0]] * (3 - len(weights))]
    shifts = [weight if bias is None else bias for weight, bias in zip(filled, [*biases, None, None])]
    grid = (sum(-(-size // blocks.rows) for size in sizes),)
    linear_kernel[grid](
        x_BD, x_BD if residual_BN is None else residual_BN, x_BD if norm_D is None else norm_D, *filled, *shifts,
        out_BN,
        *(sizes + [0, 0])[:3], x_BD.shape[1], x_BD.shape[0], eps,
        ROWS=rows, BLOCK_N=blocks.rows, BLOCK_K=blocks.columns, STAGES=blocks.stages, HAS_NORM=norm_D is not None,
        HAS_BIAS=biases[0] is not None, HAS_RESIDUAL=residual_BN is not None, PARTS=len(weights),
        num_warps=blocks.warps,
    )  # fmt: skip
    return out_BN


class Choices(NamedTuple):
    """Which experts each token takes."""

    ids: Tensor  # [B, K] int32; -1 for a token that no longer runs
    weights: Tensor  # [B, K] float32


def route(
    x_BD: Tensor,
    router_ED: Tensor,
    running_B: Tensor,
    *,
    norm_D: Tensor,
    eps: float,
    top_k: int,
    score: str,
    normalise: bool,
    weight_scale: float,
    selection_bias_E: Tensor | None = None,
    plain: bool = False,
) -> Choices:
    """Norm, router and `top_k_routing` of tokens that run; no record, no drops."""
    if plain or not has_kernels(x_BD.device):
        logits_BE = torch.nn.functional.linear(rms_norm(x_BD, norm_D, eps).float(), router_ED.float())
        options: dict[str, Any] = {"score": score, "normalise": normalise, "selection_bias_E": selection_bias_E}
        routing = top_k_routing(logits_BE, top_k=top_k, **options)
        ids_BK = routing.expert_ids.masked_fill(~running_B[:, None], -1).int()
        return Choices(ids_BK, routing.expert_weights * weight_scale)
    from moevlm.ops.kernels.decode import route_kernel

    num_experts = router_ED.shape[0]
    ids_BK = torch.empty(x_BD.shape[0], top_k, dtype=torch.int32, device=x_BD.device)
    weights_BK = torch.empty(x_BD.shape[0], top_k, dtype=torch.float32, device=x_BD.device)
    padded = _power(max(num_experts, 2))
    route_kernel[(x_BD.shape[0],)](
        x_BD, norm_D, router_ED, router_ED if selection_bias_E is None else selection_bias_E, running_B, ids_BK,
        weights_BK, x_BD.shape[1], num_experts, weight_scale, eps,
        EXPERTS=padded, TOP_K=top_k, BLOCK_K=min(2048, max(64, 8192 // padded)), SIGMOID=score == "sigmoid",
        NORMALISE=normalise, HAS_BIAS=selection_bias_E is not None, num_warps=8,
    )  # fmt: skip
    return Choices(ids_BK, weights_BK)


def gated_ffn(
    x_BD: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    choices: Choices | None,
    *,
    norm_D: Tensor | None = None,
    eps: float = 0.0,
    residual_BD: Tensor | None = None,
    plain: bool = False,
) -> Tensor:
    """``residual + sum_k w_k down_e(silu(gate_e h) * up_e h)``, h = norm(x), e = the token's k-th choice (SwiGLU).

    Args:
        choices: of `route`; None for a dense network, whose weights are [1, ...].

    Returns:
        [B, D]; a token that no longer runs gets its residual.
    """
    if plain or not has_kernels(x_BD.device) or x_BD.shape[0] > MAX_ROWS:
        h_BD = x_BD if norm_D is None else rms_norm(x_BD, norm_D, eps)
        y_BD = _plain_ffn(h_BD, gate_EFD, up_EFD, down_EDF, choices)
        return y_BD if residual_BD is None else residual_BD + y_BD
    from moevlm.ops.kernels.decode import down_kernel, gate_up_kernel

    num_rows, width = x_BD.shape
    num_experts, inner, _ = gate_EFD.shape
    top_k = 1 if choices is None else choices.ids.shape[1]
    slots = 1 if choices is None else top_k if num_rows == 1 else num_experts
    hidden_SBF = x_BD.new_empty(slots, num_rows, inner)
    out_BD = torch.empty_like(x_BD)
    ids, weights = (x_BD, x_BD) if choices is None else choices
    rows, blocks = _tile("gate_up", x_BD)
    gate_up_kernel[(-(-inner // blocks.rows), slots)](
        x_BD, x_BD if norm_D is None else norm_D, gate_EFD, up_EFD, ids, hidden_SBF, width, inner, num_rows, eps,
        ROWS=rows, TOP_K=top_k, ROUTED=choices is not None, HAS_NORM=norm_D is not None,
        BLOCK_N=blocks.rows, BLOCK_K=blocks.columns, STAGES=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    rows, blocks = _tile("down", x_BD)
    down_kernel[(-(-width // blocks.rows),)](
        hidden_SBF, down_EDF, ids, weights, x_BD if residual_BD is None else residual_BD, out_BD, width, inner,
        num_rows,
        SLOTS=slots, ROWS=rows, TOP_K=top_k, ROUTED=choices is not None, HAS_RESIDUAL=residual_BD is not None,
        BLOCK_N=blocks.rows, BLOCK_K=blocks.columns, STAGES=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    return out_BD


def _plain_ffn(h_BD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, choices: Choices | None) -> Tensor:
    """Every expert on every token, those not chosen with weight 0."""
    y_BD = torch.zeros_like(h_BD, dtype=torch.float32)
    for expert, (gate_FD, up_FD, down_DF) in enumerate(zip(gate_EFD, up_EFD, down_EDF)):
        hidden_BF = torch.nn.functional.silu(h_BD @ gate_FD.T) * (h_BD @ up_FD.T)
        part_BD = (hidden_BF @ down_DF.T).float()
        if choices is None:
            y_BD += part_BD
        else:
            share_B = (choices.weights * (choices.ids == expert)).sum(dim=1, keepdim=True)
            y_BD += torch.where(share_B != 0, part_BD * share_B, 0.0)
    return y_BD.to(h_BD.dtype)


def _tile(kernel: str, x_BD: Tensor) -> tuple[int, Blocks]:
    """Tokens a program is padded to, and its blocks, with as many loads in flight as its memory holds."""
    num_rows = x_BD.shape[0]
    assert 1 <= num_rows <= MAX_ROWS, f"a decode step takes 1 to {MAX_ROWS} tokens, got {num_rows}"
    if num_rows == 1:
        return 1, SINGLE[kernel]
    rows, blocks = max(16, _power(num_rows)), SEVERAL[kernel]
    matrices = 2 if kernel == "gate_up" else 1
    stage_bytes = x_BD.element_size() * blocks.columns * (matrices * blocks.rows + rows)
    return rows, blocks._replace(stages=max(1, min(blocks.stages, _shared_bytes(x_BD.device) // stage_bytes)))


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """What a program may hold on the chip, less what a compiler needs besides."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 2**10)) - 16 * 2**10


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
