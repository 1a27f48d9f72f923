"""Triton kernels of attention with one new token a row: rotary embedding, cache write, softmax over the cache.

The keys of a row are cut into splits, one program each, so that a batch of one fills the chip (flash-decoding: each
split keeps its maximum, its sum of exponentials and its weighted sum of values; a second kernel joins them as online
softmax does, arXiv:1805.02867). Which columns a row sees is read from the device: its first real column and the column
of the new token, so one captured graph serves every step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rotated(row, norm, cos, sin, mask, eps, HAS_NORM: tl.constexpr, HEAD: tl.constexpr):
    """``x cos + rotate_half(x) sin`` (arXiv:2104.09864) of rows [G, HEAD], after RMSNorm over the head if given."""
    d = tl.arange(0, HEAD)
    other = (d + HEAD // 2) % HEAD
    sign = tl.where(d < HEAD // 2, -1.0, 1.0)
    x = tl.load(row + d[None, :], mask=mask, other=0.0)
    turned = tl.load(row + other[None, :], mask=mask, other=0.0)
    dtype = x.dtype
    x, turned = x.to(tl.float32), turned.to(tl.float32)
    if HAS_NORM:  # rounded where the module's norm rounds
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD + eps)[:, None]
        x = (x * scale).to(dtype).to(tl.float32) * tl.load(norm + d).to(tl.float32)[None, :]
        turned = (turned * scale).to(dtype).to(tl.float32) * tl.load(norm + other).to(tl.float32)[None, :]
    return (x * cos[None, :] + sign[None, :] * turned * sin[None, :]).to(dtype)


@triton.jit
def attend_kernel(
    qkv, q_norm, k_norm, cos_table, sin_table, keys, values, starts, position,
    peaks, sums, mixed, out,
    length, heads, key_heads, window, scaling, eps,
    GROUP: tl.constexpr, PADDED: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_L: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """One program for a row, a key head and a split: [GROUP] queries over its share of the columns.

    qkv [B, (heads + 2 key_heads) * HEAD]; keys and values [B, key_heads, length, HEAD]; peaks and sums [B, heads,
    SPLITS]; mixed [B, heads, SPLITS, HEAD] float32. The first split adds the new token, from `qkv`, and stores it.
    """
    row, key_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.load(position).to(tl.int32)
    start = tl.load(starts + row).to(tl.int32)
    first = start
    if HAS_WINDOW:
        first = tl.maximum(start, column - window + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(column - first, 0), SPLITS), BLOCK_L) * BLOCK_L
    begin = first + split * share
    end = tl.minimum(begin + share, column)

    d = tl.arange(0, HEAD)
    g = tl.arange(0, PADDED)
    cos = tl.load(cos_table + (column - start) * HEAD + d).to(tl.float32)
    sin = tl.load(sin_table + (column - start) * HEAD + d).to(tl.float32)
    own = qkv + row.to(tl.int64) * (heads + 2 * key_heads) * HEAD
    query_rows = own + (key_head * GROUP + g)[:, None] * HEAD
    query = _rotated(query_rows, q_norm, cos, sin, (g < GROUP)[:, None], eps, HAS_NORM, HEAD)

    plane = (row.to(tl.int64) * key_heads + key_head) * length * HEAD
    peak = tl.full([PADDED], -float("inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    mix = tl.zeros([PADDED, HEAD], tl.float32)
    if split == 0:
        one = tl.arange(0, 1)
        key = _rotated(own + (heads + key_head + one)[:, None] * HEAD, k_norm, cos, sin, (one < 1)[:, None], eps,
                       HAS_NORM, HEAD)  # fmt: skip
        value = tl.load(own + (heads + key_heads + key_head + one)[:, None] * HEAD + d[None, :])
        tl.store(keys + plane + (column + one)[:, None] * HEAD + d[None, :], key)
        tl.store(values + plane + (column + one)[:, None] * HEAD + d[None, :], value)
        peak = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1) * scaling
        total += 1.0
        mix += value.to(tl.float32)
    for block in range(begin, end, BLOCK_L):
        c = block + tl.arange(0, BLOCK_L)
        seen = c < end
        key_dl = tl.load(keys + plane + c[None, :] * HEAD + d[:, None], mask=seen[None, :], other=0.0)
        scores = tl.dot(query, key_dl, input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        parts = tl.exp(scores - higher[:, None])
        shrink = tl.exp(peak - higher)
        value_ld = tl.load(values + plane + c[:, None] * HEAD + d[None, :], mask=seen[:, None], other=0.0)
        total = total * shrink + tl.sum(parts, axis=1)
        mix = mix * shrink[:, None] + tl.dot(parts.to(value_ld.dtype), value_ld, input_precision="ieee")
        peak = higher
    to = (row * heads + key_head * GROUP + g) * SPLITS + split
    real = g < GROUP
    if SPLITS == 1:
        y = mix / total[:, None]
        tl.store(out + to[:, None] * HEAD + d[None, :], y.to(out.dtype.element_ty), mask=real[:, None])
        return
    tl.store(peaks + to, peak, mask=real)
    tl.store(sums + to, total, mask=real)
    tl.store(mixed + to[:, None] * HEAD + d[None, :], mix, mask=real[:, None])


@triton.jit
def join_kernel(peaks, sums, mixed, out, HEAD: tl.constexpr, SPLITS: tl.constexpr):
    """One program for a row's head: the splits joined; out [B, heads * HEAD]."""
    head = tl.program_id(0)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, HEAD)
    peak = tl.load(peaks + head * SPLITS + s)
    share = tl.exp(peak - tl.max(peak, axis=0))  # the first split saw the new token, so the maximum is finite
    total = tl.sum(tl.load(sums + head * SPLITS + s) * share, axis=0)
    mix = tl.load(mixed + (head * SPLITS + s)[:, None] * HEAD + d[None, :])
    y = tl.sum(mix * share[:, None], axis=0) / total
    tl.store(out + head * HEAD + d, y.to(out.dtype.element_ty))
