"""Kernels over rows of logits, a program for a row or a block of one; `moevlm.ops.vocabulary_kernels` calls them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def squashed(raw, scale, cap, CAPPED: tl.constexpr):
    logits = raw.to(tl.float32) * scale
    if CAPPED:
        logits = cap * tanh(logits / cap)
    return logits


@triton.jit
def log_of_mixture(log_a, log_b, share):
    """``log(share a + (1 - share) b)``"""
    a = log_a + tl.log(share)
    b = log_b + tl.log(1 - share)
    return tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))


@triton.jit
def divergence_terms(log_p, log_q, share, KIND: tl.constexpr):
    """Of each outcome: its term of D, and ``q dD/dq`` up to a multiple of q."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if KIND == 0:
        term = p * (log_p - log_q)
        slope = -p
    elif KIND == 1:
        term = q * (log_q - log_p)
        slope = term
    elif KIND == 2:
        log_m = log_of_mixture(log_p, log_q, share)
        slope = (1 - share) * q * (log_q - log_m)
        term = share * p * (log_p - log_m) + slope
    elif KIND == 3:
        log_m = log_of_mixture(log_p, log_q, share)
        term = p * (log_p - log_m)
        slope = -(1 - share) * tl.exp(log_p + log_q - log_m)
    elif KIND == 4:
        log_m = log_of_mixture(log_q, log_p, share)
        term = q * (log_q - log_m)
        slope = term - share * tl.exp(2 * log_q - log_m)
    else:
        term = 0.5 * tl.abs(p - q)
        slope = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    return term, slope


@triton.jit
def statistics_kernel(
    student_pointer,
    teacher_pointer,
    targets_pointer,
    found_pointer,
    num_rows,
    num_columns,
    num_common,
    student_stride,
    teacher_stride,
    scale,
    cap,
    teacher_scale,
    teacher_cap,
    HAS_TEACHER: tl.constexpr,
    SHORTER: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_row = student_pointer + row * student_stride
    teacher_row = teacher_pointer + row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    # -1e30 is the maximum of nothing: finite, so that differences of two are 0 and not NaN;
    # maxima are of the row, sums of each lane: one reduction across warps a block for a maximum, none for a sum
    top = 0
    top_value = -1.0e30
    sums = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    common_max = -1.0e30
    common_sums = tl.zeros([BLOCK], tl.float32)
    t_top = 0
    t_value = -1.0e30
    t_sums = tl.zeros([BLOCK], tl.float32)
    t_weighted = tl.zeros([BLOCK], tl.float32)
    apart = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        inside = columns < num_columns
        raw = tl.load(student_row + columns, mask=inside, other=0.0)
        logits = tl.where(inside, squashed(raw, scale, cap, CAPPED), -1.0e30)
        block_value, block_top = tl.max(logits, axis=0, return_indices=True)
        highest = tl.maximum(top_value, block_value)
        top = tl.where(block_value > top_value, start + block_top, top)
        shrink = tl.exp(top_value - highest)
        masses = tl.where(inside, tl.exp(logits - highest), 0.0)
        sums = sums * shrink + masses
        weighted = weighted * shrink + tl.where(masses > 0, masses * logits, 0.0)
        top_value = highest
        if HAS_TEACHER:
            common = columns < num_common
            t_raw = tl.load(teacher_row + columns, mask=common, other=0.0)
            t_logits = tl.where(common, squashed(t_raw, teacher_scale, teacher_cap, TEACHER_CAPPED), -1.0e30)
            block_value, block_top = tl.max(t_logits, axis=0, return_indices=True)
            highest = tl.maximum(t_value, block_value)
            t_top = tl.where(block_value > t_value, start + block_top, t_top)
            shrink = tl.exp(t_value - highest)
            masses = tl.where(common, tl.exp(t_logits - highest), 0.0)
            t_sums = t_sums * shrink + masses
            # an impossible token of the teacher has logit -inf and mass 0; its product would be NaN
            t_weighted = t_weighted * shrink + tl.where(masses > 0, masses * t_logits, 0.0)
            apart = apart * shrink + tl.where(masses > 0, masses * (t_logits - logits), 0.0)
            t_value = highest
            if SHORTER:
                shared = tl.where(common, logits, -1.0e30)
                highest = tl.maximum(common_max, tl.max(shared, axis=0))
                masses = tl.where(common, tl.exp(shared - highest), 0.0)
                common_sums = common_sums * tl.exp(common_max - highest) + masses
                common_max = highest
    total = tl.sum(sums, axis=0)
    log_z = top_value + tl.log(total)
    target = tl.load(targets_pointer + row)
    chosen = squashed(tl.load(student_row + target), scale, cap, CAPPED)
    tl.store(found_pointer + row, log_z)
    tl.store(found_pointer + num_rows + row, log_z - tl.sum(weighted, axis=0) / total)
    tl.store(found_pointer + 2 * num_rows + row, chosen - log_z)
    tl.store(found_pointer + 3 * num_rows + row, tl.cast(top, tl.float32))
    if HAS_TEACHER:
        if SHORTER:
            log_z = common_max + tl.log(tl.sum(common_sums, axis=0))
        t_total = tl.sum(t_sums, axis=0)
        t_log_z = t_value + tl.log(t_total)
        known = target < num_common
        t_raw = tl.load(teacher_row + target, mask=known, other=0.0)
        t_chosen = squashed(t_raw, teacher_scale, teacher_cap, TEACHER_CAPPED) - t_log_z
        tl.store(found_pointer + 4 * num_rows + row, log_z)
        tl.store(found_pointer + 5 * num_rows + row, t_log_z)
        tl.store(found_pointer + 6 * num_rows + row, t_log_z - tl.sum(t_weighted, axis=0) / t_total)
        tl.store(found_pointer + 7 * num_rows + row, tl.where(known, t_chosen, float("-inf")))
        tl.store(found_pointer + 8 * num_rows + row, tl.cast(t_top, tl.float32))
        tl.store(found_pointer + 9 * num_rows + row, tl.sum(apart, axis=0) / t_total - t_log_z + log_z)


@triton.jit
def gradient_kernel(
    student_pointer,
    teacher_pointer,
    targets_pointer,
    weights_pointer,
    log_z_pointer,
    common_pointer,
    teacher_z_pointer,
    slopes_pointer,
    num_columns,
    num_common,
    student_stride,
    teacher_stride,
    scale,
    cap,
    teacher_scale,
    teacher_cap,
    lm_weight,
    coldness,
    share,
    KIND: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    place = student_pointer + row * student_stride + columns
    logits = squashed(tl.load(place, mask=inside, other=0.0), scale, cap, CAPPED)
    gradient = tl.zeros([BLOCK], tl.float32)
    if HAS_TARGETS:
        target = tl.load(targets_pointer + row)
        gradient = lm_weight * (tl.exp(logits - tl.load(log_z_pointer + row)) - tl.where(columns == target, 1.0, 0.0))
    if HAS_TEACHER:
        common = columns < num_common
        raw = tl.load(teacher_pointer + row * teacher_stride + columns, mask=common, other=0.0)
        t_logits = squashed(raw, teacher_scale, teacher_cap, TEACHER_CAPPED)
        log_q = logits * coldness - tl.load(common_pointer + row)
        log_p = tl.maximum(t_logits * coldness - tl.load(teacher_z_pointer + row), -1.0e4)
        _, slope = divergence_terms(log_p, log_q, share, KIND)
        slope -= tl.exp(log_q) * tl.load(slopes_pointer + row)
        gradient += tl.where(common, tl.load(weights_pointer + row) * slope, 0.0)
    if CAPPED:
        gradient *= 1 - (logits / cap) * (logits / cap)
    tl.store(place, (gradient * scale).to(student_pointer.dtype.element_ty), mask=inside)


@triton.jit
def divergence_kernel(
    student_pointer,
    teacher_pointer,
    log_z_pointer,
    teacher_z_pointer,
    found_pointer,
    num_rows,
    num_common,
    student_stride,
    teacher_stride,
    scale,
    cap,
    teacher_scale,
    teacher_cap,
    coldness,
    share,
    KIND: tl.constexpr,
    IS_SUMMED: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_row = student_pointer + row * student_stride
    teacher_row = teacher_pointer + row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    if IS_SUMMED:
        log_z = tl.load(log_z_pointer + row)
        t_log_z = tl.load(teacher_z_pointer + row)
    else:
        highest = -1.0e30
        t_highest = -1.0e30
        sums = tl.zeros([BLOCK], tl.float32)
        t_sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_common, BLOCK):
            columns = start + lanes
            inside = columns < num_common
            raw = tl.load(student_row + columns, mask=inside, other=0.0)
            t_raw = tl.load(teacher_row + columns, mask=inside, other=0.0)
            logits = tl.where(inside, squashed(raw, scale, cap, CAPPED) * coldness, -1.0e30)
            t_logits = squashed(t_raw, teacher_scale, teacher_cap, TEACHER_CAPPED) * coldness
            t_logits = tl.where(inside, t_logits, -1.0e30)
            higher = tl.maximum(highest, tl.max(logits, 0))
            t_higher = tl.maximum(t_highest, tl.max(t_logits, 0))
            sums = sums * tl.exp(highest - higher) + tl.where(inside, tl.exp(logits - higher), 0.0)
            t_sums = t_sums * tl.exp(t_highest - t_higher) + tl.where(inside, tl.exp(t_logits - t_higher), 0.0)
            highest = higher
            t_highest = t_higher
        log_z = highest + tl.log(tl.sum(sums, 0))
        t_log_z = t_highest + tl.log(tl.sum(t_sums, 0))
    values = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_common, BLOCK):
        columns = start + lanes
        inside = columns < num_common
        raw = tl.load(student_row + columns, mask=inside, other=0.0)
        t_raw = tl.load(teacher_row + columns, mask=inside, other=0.0)
        log_q = squashed(raw, scale, cap, CAPPED) * coldness - log_z
        log_p = squashed(t_raw, teacher_scale, teacher_cap, TEACHER_CAPPED) * coldness - t_log_z
        term, slope = divergence_terms(tl.maximum(log_p, -1.0e4), log_q, share, KIND)
        values += tl.where(inside, term, 0.0)
        slopes += tl.where(inside, slope, 0.0)
    tl.store(found_pointer + row, log_z)
    tl.store(found_pointer + num_rows + row, t_log_z)
    tl.store(found_pointer + 2 * num_rows + row, tl.sum(values, 0))
    tl.store(found_pointer + 3 * num_rows + row, tl.sum(slopes, 0))


@triton.jit
def scale_kernel(values_pointer, factor_pointer, num_values, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_pointer + places, mask=places < num_values, other=0.0)
    scaled = values.to(tl.float32) * tl.load(factor_pointer).to(tl.float32)
    tl.store(values_pointer + places, scaled.to(values.dtype), mask=places < num_values)
