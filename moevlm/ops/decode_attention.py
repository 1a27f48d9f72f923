"""Attention of one new token a row over a preallocated key-value cache; see `decode` for what its maps share."""

from __future__ import annotations

import torch
from torch import Tensor

from moevlm.ops.decode import _power, has_kernels, rms_norm

HEAD_WIDTHS = (16, 32, 64, 128, 256)
"""Widths of a head that the kernels know."""

TARGET_PROGRAMS = 264  # two for each multiprocessor of the larger chips of today


def attend(
    qkv_BN: Tensor,
    keys_BHLd: Tensor,
    values_BHLd: Tensor,
    starts_B: Tensor,
    position: Tensor,
    *,
    cos_Ld: Tensor,
    sin_Ld: Tensor,
    num_heads: int,
    scaling: float,
    window: int | None = None,
    query_norm_d: Tensor | None = None,
    key_norm_d: Tensor | None = None,
    eps: float = 0.0,
    plain: bool = False,
) -> Tensor:
    """Softmax attention of the new token of each row, which joins the cache in place.

    Queries and keys are rotated (arXiv:2104.09864), after RMSNorm over each head where it is given (Qwen3).

    Args:
        qkv_BN: queries, keys and values of the new tokens side by side, [B, (H + 2 Hk) d].
        keys_BHLd: [B, Hk, L, d]; column `position` is written, columns before a row's start are never seen.
        starts_B: int64, first real column of each row (padding stands on the left).
        position: int64, one element: the new token's column; a row's rotary position is this minus its start.
        cos_Ld: by rotary position, at least L.
        window: columns further back than this are not seen.

    Returns:
        [B, H d].
    """
    if plain or not has_kernels(qkv_BN.device):
        norms = None if query_norm_d is None or key_norm_d is None else (query_norm_d, key_norm_d)
        angles = (cos_Ld, sin_Ld)
        return _plain(
            qkv_BN, keys_BHLd, values_BHLd, starts_B, position, angles, num_heads, scaling, window, norms, eps
        )
    from moevlm.ops.kernels.decode_attention import attend_kernel, join_kernel

    batch, key_heads, length, head = keys_BHLd.shape
    splits = _power(max(1, min(64, TARGET_PROGRAMS // (batch * key_heads), -(-length // 64))))
    peaks = torch.empty(batch, num_heads, splits, dtype=torch.float32, device=qkv_BN.device)
    sums, mixed = torch.empty_like(peaks), peaks.new_empty(batch, num_heads, splits, head)
    out_BN = qkv_BN.new_empty(batch, num_heads * head)
    group = num_heads // key_heads
    has_norm = query_norm_d is not None
    attend_kernel[(batch, key_heads, splits)](
        qkv_BN, query_norm_d if has_norm else qkv_BN, key_norm_d if has_norm else qkv_BN, cos_Ld, sin_Ld,
        keys_BHLd, values_BHLd, starts_B, position, peaks, sums, mixed, out_BN,
        length, num_heads, key_heads, window or 0, scaling, eps,
        GROUP=group, PADDED=max(16, _power(group)), HEAD=head, SPLITS=splits, BLOCK_L=64,
        HAS_NORM=has_norm, HAS_WINDOW=window is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        join_kernel[(batch * num_heads,)](peaks, sums, mixed, out_BN, HEAD=head, SPLITS=splits, num_warps=4)
    return out_BN


def _plain(
    qkv_BN: Tensor,
    keys_BHLd: Tensor,
    values_BHLd: Tensor,
    starts_B: Tensor,
    position: Tensor,
    angles: tuple[Tensor, Tensor],
    num_heads: int,
    scaling: float,
    window: int | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    batch, key_heads, length, head = keys_BHLd.shape
    qkv_BHd = qkv_BN.view(batch, -1, head)
    query_BHd, key_BHd, value_BHd = qkv_BHd.split([num_heads, key_heads, key_heads], dim=1)
    if norms is not None:
        query_BHd, key_BHd = rms_norm(query_BHd, norms[0], eps), rms_norm(key_BHd, norms[1], eps)
    places_B = position - starts_B
    cos_B1d, sin_B1d = (table[places_B][:, None] for table in angles)
    query_BHd, key_BHd = (_rotate(states, cos_B1d, sin_B1d) for states in (query_BHd, key_BHd))
    keys_BHLd.index_copy_(2, position.view(1), key_BHd[:, :, None])
    values_BHLd.index_copy_(2, position.view(1), value_BHd[:, :, None])
    columns_L = torch.arange(length, device=qkv_BN.device)
    seen_BL = (columns_L >= starts_B[:, None]) & (columns_L <= position)
    if window is not None:
        seen_BL = seen_BL & (columns_L > position - window)
    mixed_BH1d = torch.nn.functional.scaled_dot_product_attention(
        query_BHd[:, :, None],
        keys_BHLd,
        values_BHLd,
        attn_mask=seen_BL[:, None, None],
        scale=scaling,
        enable_gqa=num_heads != key_heads,
    )
    return mixed_BH1d.flatten(1)


def _rotate(states_BHd: Tensor, cos_B1d: Tensor, sin_B1d: Tensor) -> Tensor:
    first, second = states_BHd.chunk(2, dim=-1)
    return states_BHd * cos_B1d + torch.cat([-second, first], dim=-1) * sin_B1d
