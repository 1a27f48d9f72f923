"""Attention over sequences of any length in one row, by the kernel that torch brings along.

`torch.nn.attention.varlen` (FlashAttention-2, arXiv:2307.08691, or cuDNN) takes [U, H, d] and where the sequences end:
no padding, no mask. Its arguments have changed between versions of torch, so they are looked up.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

varlen_attn: Any = None
with contextlib.suppress(ImportError):  # a torch without it
    from torch.nn.attention.varlen import varlen_attn
ARGUMENTS = frozenset() if varlen_attn is None else frozenset(inspect.signature(varlen_attn).parameters)

KERNELS = ("auto", "varlen", "padded")
"""auto is varlen on a GPU where torch has it; what varlen cannot do (float32, dropout, a soft cap) is
padded in either."""

WIDEST_HEAD = 256
DEVICE_TYPES = ("cuda",)


def check_kernel_name(kernel: str) -> None:
    """Raise a ValueError for a kernel that is none of KERNELS."""
    if kernel not in KERNELS:
        raise ValueError(f"attention must be one of {KERNELS}, got {kernel!r}; set model.attention")


def check_kernel(kernel: str, device: torch.device) -> bool:
    """Whether the kernel for any length is wanted on this device.

    Raises:
        ValueError: an unknown kernel, or "varlen" where there is none.
    """
    check_kernel_name(kernel)
    possible = device.type in DEVICE_TYPES and varlen_attn is not None
    if kernel == "varlen" and not possible:
        raise ValueError(
            f"attention=varlen needs a GPU and torch.nn.attention.varlen, the batch is on {device}; "
            "set model.attention=auto"
        )
    return kernel != "padded" and possible


def takes_varlen(
    ends: Tensor | None,
    query: Tensor,
    value: Tensor,
    *,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> bool:
    """Whether this attention can run by the kernel; `ends` is None where it is not wanted."""
    if ends is None or softcap is not None or dropout:
        return False
    if sliding_window is not None and "window_size" not in ARGUMENTS:
        return False
    width = query.shape[-1]
    is_half = _dtype(query) in (torch.bfloat16, torch.float16)
    return is_half and width == value.shape[-1] and width % 8 == 0 and width <= WIDEST_HEAD


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor | None,
    longest: int,
    *,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Causal softmax attention inside each sequence.

    Args:
        query: [1, H, U, d]; key and value [1, Hk, U, d], Hk divides H; cast where autocast would cast them.
        ends: [B + 1] int32, 0 and the end of each sequence.
        longest: of the sequences.
        sliding_window: tokens that a token sees, itself included.

    Returns:
        [1, U, H, d]
    """
    options: dict[str, Any] = {}
    query, key, value = (states.to(_dtype(states)) for states in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in ARGUMENTS:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    query_UHD, key_UHD, value_UHD = (states[0].transpose(0, 1) for states in (query, key, value))
    if "scale" in ARGUMENTS:
        options["scale"] = scaling
    elif scaling is not None:  # older ones scale by the width of a head
        query_UHD = query_UHD * (scaling * query.shape[-1] ** 0.5)
    if "window_size" in ARGUMENTS:
        options["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    else:
        options["is_causal"] = True
    output_UHD: Tensor = varlen_attn(query_UHD, key_UHD, value_UHD, ends, ends, longest, longest, **options)
    return output_UHD.unsqueeze(0)


def _dtype(states: Tensor) -> torch.dtype:
    """Attention runs in autocast's dtype; torch's function for any length does not know of that by itself."""
    device_type = states.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else states.dtype
