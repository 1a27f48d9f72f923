"""Triton kernels of one decode step: every weight is read once, whatever the number of tokens (1 to 64).

A step with few tokens is bound by memory bandwidth, so a kernel's grid runs over rows of a weight matrix and each
program takes all tokens. With one token a program multiplies and adds (a GEMV); with more, tokens are padded to 16, 32
or 64 columns of a tensor-core product. RMSNorm (arXiv:1910.07467) rides along, as ``W (g * x / rms(x)) = (W (g * x)) /
rms(x)``: one loop over the width gives both the product and the mean square.

Inference only. Names carry no shape suffix here: pointers have no shape, and blocks say theirs in comments.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def linear_kernel(
    x, residual, norm, w0, w1, w2, b0, b1, b2, out,
    n0, n1, n2, width, rows, eps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``out = norm(x) [w0; w1; w2]^T + bias + residual``; up to three matrices side by side, each [n, width]."""
    pid = tl.program_id(0)
    blocks0 = tl.cdiv(n0, BLOCK_N)
    w, b, n, offset, first = w0, b0, n0, 0, 0
    if PARTS == 3:
        blocks1 = tl.cdiv(n1, BLOCK_N)
        if pid >= blocks0 + blocks1:
            w, b, n, offset, first = w2, b2, n2, n0 + n1, blocks0 + blocks1
        elif pid >= blocks0:
            w, b, n, offset, first = w1, b1, n1, n0, blocks0
    places = (pid - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = places < n
    row_starts = w + places.to(tl.int64)[:, None] * width
    columns = tl.arange(0, BLOCK_K)
    tokens = tl.arange(0, ROWS)
    if ROWS == 1:
        sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
            k = start + columns
            x_k = tl.load(x + k, mask=k < width, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares += x_k * x_k
                x_k *= tl.load(norm + k, mask=k < width, other=0.0).to(tl.float32)
            w_nk = tl.load(row_starts + k[None, :], mask=inside[:, None] & (k < width)[None, :], other=0.0)
            sums += w_nk.to(tl.float32) * x_k[None, :]
        y = tl.sum(sums, axis=1)[:, None]
        if HAS_NORM:
            y *= tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    else:
        y = tl.zeros([BLOCK_N, ROWS], tl.float32)
        token_squares = tl.zeros([ROWS], tl.float32)
        for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
            k = start + columns
            seen = (k < width)[:, None] & (tokens < rows)[None, :]
            x_kt = tl.load(x + tokens[None, :] * width + k[:, None], mask=seen, other=0.0)
            w_nk = tl.load(row_starts + k[None, :], mask=inside[:, None] & (k < width)[None, :], other=0.0)
            if HAS_NORM:
                x32 = x_kt.to(tl.float32)
                token_squares += tl.sum(x32 * x32, axis=0)
                x_kt = (x32 * tl.load(norm + k, mask=k < width, other=0.0).to(tl.float32)[:, None]).to(w_nk.dtype)
            y = tl.dot(w_nk, x_kt, y, input_precision="ieee")
        if HAS_NORM:
            y *= tl.rsqrt(token_squares / width + eps)[None, :]
    if HAS_BIAS:
        y += tl.load(b + places, mask=inside, other=0.0).to(tl.float32)[:, None]
    total = n0 + n1 + n2
    to = tokens[None, :] * total + (offset + places)[:, None]
    written = inside[:, None] & (tokens < rows)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual + to, mask=written, other=0.0).to(tl.float32)
    tl.store(out + to, y.to(out.dtype.element_ty), mask=written)


@triton.jit
def route_kernel(
    x, norm, router, bias, running, ids, weights,
    width, num_experts, weight_scale, eps,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program a token: norm(x), router logits in float32, the `TOP_K` best (ties to the lower number), weights.

    A token that no longer runs gets expert -1, whose weights nobody reads.
    """
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK_K)
    experts = tl.arange(0, EXPERTS)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + columns
        x_k = tl.load(x + token * width + k, mask=k < width, other=0.0).to(tl.float32)
        squares += x_k * x_k
    scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    sums = tl.zeros([EXPERTS, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + columns
        x_k = tl.load(x + token * width + k, mask=k < width, other=0.0)
        g_k = tl.load(norm + k, mask=k < width, other=0.0)
        # rounded as the module's norm rounds, so that near ties are decided alike
        h_k = ((x_k.to(tl.float32) * scale).to(x_k.dtype).to(tl.float32) * g_k.to(tl.float32)).to(x_k.dtype)
        seen = (experts < num_experts)[:, None] & (k < width)[None, :]
        r_ek = tl.load(router + experts[:, None] * width + k[None, :], mask=seen, other=0.0)
        sums += r_ek.to(tl.float32) * h_k.to(tl.float32)[None, :]
    known = experts < num_experts
    logits = tl.where(known, tl.sum(sums, axis=1), -float("inf"))
    if SIGMOID:  # log sigmoid, stable for either sign
        log_scores = tl.minimum(logits, 0.0) - tl.log(1 + tl.exp(-tl.abs(logits)))
    else:
        shifted = logits - tl.max(logits, axis=0)
        log_scores = shifted - tl.log(tl.sum(tl.exp(shifted), axis=0))
    ranked = logits
    if HAS_BIAS:
        ranked = tl.exp(log_scores) + tl.load(bias + experts, mask=known, other=0.0).to(tl.float32)
    ranked = tl.where(known, ranked, -float("inf"))
    is_running = tl.load(running + token) != 0
    order = tl.full([EXPERTS], -1, tl.int32)  # which choice an expert is
    for choice in tl.static_range(TOP_K):
        taken = tl.argmax(ranked, axis=0, tie_break_left=True)
        order = tl.where(experts == taken, choice, order)
        ranked = tl.where(experts == taken, -float("inf"), ranked)
    is_chosen = order >= 0
    if NORMALISE:
        best = tl.max(tl.where(is_chosen, log_scores, -float("inf")), axis=0)
        parts = tl.where(is_chosen, tl.exp(log_scores - best), 0.0)
        parts = parts / tl.sum(parts, axis=0)
    else:
        parts = tl.where(is_chosen, tl.exp(log_scores), 0.0)
    to = token * TOP_K + order
    tl.store(ids + to, tl.where(is_running, experts, -1), mask=is_chosen)
    tl.store(weights + to, parts * weight_scale, mask=is_chosen)


@triton.jit
def gate_up_kernel(
    x, norm, gate, up, ids, hidden,
    width, inner, rows, eps,
    ROWS: tl.constexpr, TOP_K: tl.constexpr, ROUTED: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``hidden[slot] = silu(gate_e norm(x)) * (up_e norm(x))`` of one expert a slot; [slots, rows, inner].

    One token: slot s is its s-th choice. More: slot e is expert e, and leaves when no token chose it.
    """
    slot = tl.program_id(1)
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, ROWS)
    expert = slot
    if ROUTED:
        if ROWS == 1:
            expert = tl.load(ids + slot)
            if expert < 0:
                return
        else:
            count = 0
            for choice in tl.static_range(TOP_K):
                chosen = tl.load(ids + tokens * TOP_K + choice, mask=tokens < rows, other=-1)
                count += tl.sum((chosen == slot).to(tl.int32), axis=0)
            if count == 0:
                return
    inside = places < inner
    row_starts = (expert.to(tl.int64) * inner + places.to(tl.int64))[:, None] * width
    columns = tl.arange(0, BLOCK_K)
    if ROWS == 1:
        gates = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        ups = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
            k = start + columns
            x_k = tl.load(x + k, mask=k < width, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares += x_k * x_k
                x_k *= tl.load(norm + k, mask=k < width, other=0.0).to(tl.float32)
            seen = inside[:, None] & (k < width)[None, :]
            gates += tl.load(gate + row_starts + k[None, :], mask=seen, other=0.0).to(tl.float32) * x_k[None, :]
            ups += tl.load(up + row_starts + k[None, :], mask=seen, other=0.0).to(tl.float32) * x_k[None, :]
        a, b = tl.sum(gates, axis=1)[:, None], tl.sum(ups, axis=1)[:, None]
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
            a, b = a * scale, b * scale
    else:
        a = tl.zeros([BLOCK_N, ROWS], tl.float32)
        b = tl.zeros([BLOCK_N, ROWS], tl.float32)
        token_squares = tl.zeros([ROWS], tl.float32)
        for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
            k = start + columns
            present = (k < width)[:, None] & (tokens < rows)[None, :]
            x_kt = tl.load(x + tokens[None, :] * width + k[:, None], mask=present, other=0.0)
            seen = inside[:, None] & (k < width)[None, :]
            gate_nk = tl.load(gate + row_starts + k[None, :], mask=seen, other=0.0)
            up_nk = tl.load(up + row_starts + k[None, :], mask=seen, other=0.0)
            if HAS_NORM:
                x32 = x_kt.to(tl.float32)
                token_squares += tl.sum(x32 * x32, axis=0)
                x_kt = (x32 * tl.load(norm + k, mask=k < width, other=0.0).to(tl.float32)[:, None]).to(gate_nk.dtype)
            a = tl.dot(gate_nk, x_kt, a, input_precision="ieee")
            b = tl.dot(up_nk, x_kt, b, input_precision="ieee")
        if HAS_NORM:
            scales = tl.rsqrt(token_squares / width + eps)[None, :]
            a, b = a * scales, b * scales
    y = a / (1 + tl.exp(-a)) * b
    to = (slot * rows + tokens)[None, :] * inner + places[:, None]
    tl.store(hidden + to, y.to(hidden.dtype.element_ty), mask=inside[:, None] & (tokens < rows)[None, :])


@triton.jit
def down_kernel(
    hidden, down, ids, weights, residual, out,
    width, inner, rows,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr, ROUTED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out = residual + sum over the chosen experts e of weight_e * (down_e hidden_e)``, added in float32."""
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = places < width
    columns = tl.arange(0, BLOCK_K)
    tokens = tl.arange(0, ROWS)
    y = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for slot in range(SLOTS):
        expert = slot
        mix = tl.full([ROWS], 1.0, tl.float32)
        count = 1
        if ROUTED:
            if ROWS == 1:
                expert = tl.load(ids + slot)
                count = (expert >= 0).to(tl.int32)
                mix = tl.load(weights + slot + tokens)
            else:
                mix = tl.zeros([ROWS], tl.float32)
                count = 0
                for choice in tl.static_range(TOP_K):
                    chosen = tl.load(ids + tokens * TOP_K + choice, mask=tokens < rows, other=-1) == slot
                    share = tl.load(weights + tokens * TOP_K + choice, mask=tokens < rows, other=0.0)
                    mix += tl.where(chosen, share, 0.0)
                    count += tl.sum(chosen.to(tl.int32), axis=0)
        if count > 0:
            row_starts = down + (expert * width.to(tl.int64) + places.to(tl.int64))[:, None] * inner
            if ROWS == 1:
                sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                for start in tl.range(0, inner, BLOCK_K, num_stages=STAGES):
                    k = start + columns
                    h_k = tl.load(hidden + slot * inner + k, mask=k < inner, other=0.0).to(tl.float32)
                    w_nk = tl.load(row_starts + k[None, :], mask=inside[:, None] & (k < inner)[None, :], other=0.0)
                    sums += w_nk.to(tl.float32) * h_k[None, :]
                part = tl.sum(sums, axis=1)[:, None]
            else:
                part = tl.zeros([BLOCK_N, ROWS], tl.float32)
                for start in tl.range(0, inner, BLOCK_K, num_stages=STAGES):
                    k = start + columns
                    seen = (k < inner)[:, None] & (tokens < rows)[None, :]
                    h_kt = tl.load(hidden + (slot * rows + tokens)[None, :] * inner + k[:, None], mask=seen, other=0.0)
                    w_nk = tl.load(row_starts + k[None, :], mask=inside[:, None] & (k < inner)[None, :], other=0.0)
                    part = tl.dot(w_nk, h_kt, part, input_precision="ieee")
            y += tl.where(mix[None, :] != 0, part * mix[None, :], 0.0)  # 0 * inf of a token that went elsewhere
    to = tokens[None, :] * width + places[:, None]
    written = inside[:, None] & (tokens < rows)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual + to, mask=written, other=0.0).to(tl.float32)
    tl.store(out + to, y.to(out.dtype.element_ty), mask=written)
