"""Triton kernels over rows of logits: what a loss needs to know of a row, and its gradient in the logits' own place.

One reading of the logits gives the statistics of both models (online softmax, arXiv:1805.02867), a second one turns the
student's logits into their gradient: 3 readings and 1 writing of (rows x vocabulary) for a distillation loss, where a
chain of torch operations takes some thirty. Sums are in float32 whatever the logits are in. `moevlm.losses.fused` has
the matrix products around; on a CPU the kernels run in Triton's interpreter, for tests only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

STATISTICS_BLOCK, STATISTICS_WARPS = 4096, 16
GRADIENT_BLOCK, GRADIENT_WARPS = 4096, 8


class RowStatistics(NamedTuple):
    """Of R rows at temperature 1, float32; the teacher's are 0 without one."""

    log_z: Tensor  # [R] log sum_v exp of the student's logits
    entropy: Tensor  # [R] of the student, nats
    target: Tensor  # [R] the student's log-probability of the target
    top1: Tensor  # [R] the student's likeliest token, as a float
    common_log_z: Tensor  # [R] the student's over the columns that the teacher has, too
    teacher_log_z: Tensor  # [R]
    teacher_entropy: Tensor  # [R] nats
    teacher_target: Tensor  # [R] the teacher's log-probability of the target; -inf for a token it does not have
    teacher_top1: Tensor  # [R]
    kl: Tensor  # [R] KL(teacher || student) over the common columns, nats


class DivergenceStatistics(NamedTuple):
    """A divergence of R rows and what its gradient needs, float32; over the common columns, at its temperature."""

    log_z: Tensor  # [R] of the student
    teacher_log_z: Tensor  # [R]
    value: Tensor  # [R] D(p, q), nats
    mean_slope: Tensor  # [R] sum_v q_v dD/dq_v, up to the constant that cancels


KINDS = ("forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation")
"""The divergences of `moevlm.losses.divergences` that the kernels know; a kernel is given the place in this list."""


class Squash(NamedTuple):
    """How raw products become logits: ``cap * tanh(scale * x / cap)``; no cap is 0."""

    scale: float = 1.0
    cap: float = 0.0


def row_statistics(
    logits_CV: Tensor,
    targets_C: Tensor | None,
    squash: Squash,
    teacher_logits_CM: Tensor | None = None,
    teacher_squash: Squash = Squash(),  # noqa: B008  (immutable)
) -> RowStatistics:
    """One pass over the logits of C rows.

    Args:
        logits_CV: raw products of the student, rows contiguous.
        targets_C: int64; None leaves `target` and `teacher_target` as those of token 0.
        teacher_logits_CM: raw products over the first M <= V tokens.
    """
    num_rows, num_columns = logits_CV.shape
    teacher_CM = logits_CV if teacher_logits_CM is None else teacher_logits_CM
    targets_C = torch.zeros(num_rows, dtype=torch.int64, device=logits_CV.device) if targets_C is None else targets_C
    found_FC = torch.zeros(len(RowStatistics._fields), num_rows, dtype=torch.float32, device=logits_CV.device)
    if num_rows:
        _statistics_kernel[(num_rows,)](
            logits_CV,
            teacher_CM,
            targets_C,
            found_FC,
            num_rows,
            num_columns,
            teacher_CM.shape[1],
            logits_CV.stride(0),
            teacher_CM.stride(0),
            squash.scale,
            squash.cap,
            teacher_squash.scale,
            teacher_squash.cap,
            HAS_TEACHER=teacher_logits_CM is not None,
            SHORTER=teacher_CM.shape[1] < num_columns,
            CAPPED=squash.cap > 0,
            TEACHER_CAPPED=teacher_squash.cap > 0,
            BLOCK=STATISTICS_BLOCK,
            num_warps=STATISTICS_WARPS,
        )
    return RowStatistics(*found_FC.unbind(0))


def divergence_statistics(
    logits_CV: Tensor,
    squash: Squash,
    teacher_logits_CM: Tensor,
    teacher_squash: Squash,
    *,
    kind: str,
    share: float,
    temperature: float,
) -> DivergenceStatistics:
    """Two passes over the logits of C rows: partition sums at the temperature, then the divergence.

    Args:
        kind: of KINDS.
        share: beta of "jsd", the skew of the skewed ones.
    """
    num_rows, num_common = teacher_logits_CM.shape
    found_FC = torch.zeros(len(DivergenceStatistics._fields), num_rows, dtype=torch.float32, device=logits_CV.device)
    if num_rows:
        _divergence_kernel[(num_rows,)](
            logits_CV,
            teacher_logits_CM,
            found_FC,
            num_rows,
            num_common,
            logits_CV.stride(0),
            teacher_logits_CM.stride(0),
            squash.scale,
            squash.cap,
            teacher_squash.scale,
            teacher_squash.cap,
            1.0 / temperature,
            share,
            KIND=KINDS.index(kind),
            CAPPED=squash.cap > 0,
            TEACHER_CAPPED=teacher_squash.cap > 0,
            BLOCK=STATISTICS_BLOCK,
            num_warps=STATISTICS_WARPS,
        )
    return DivergenceStatistics(*found_FC.unbind(0))


def write_gradient(
    logits_CV: Tensor,
    targets_C: Tensor | None,
    squash: Squash,
    statistics: RowStatistics,
    lm_weight: float,
    teacher_logits_CM: Tensor | None = None,
    teacher_squash: Squash = Squash(),  # noqa: B008  (immutable)
    kd_weights_C: Tensor | None = None,
    divergence: DivergenceStatistics | None = None,
    *,
    kind: str = "forward_kl",
    share: float = 0.5,
    temperature: float = 1.0,
) -> None:
    """Replace the raw products by the gradient of ``sum_r kd_r tau^2 D(p_r, q_r) + lm_weight * CE_r`` to them.

    ``kd tau q_v (dD/dq_v - sum_u q_u dD/dq_u)`` on the columns of both models, where q is renormalised, and ``lm (q -
    onehot)`` on all, times the derivative of the squash. For the forward KL the first is ``kd tau (q - p)``. Without a
    teacher only the second.

    Args:
        divergence: None for the forward KL at temperature 1, which `statistics` know.
    """
    num_rows, num_columns = logits_CV.shape
    teacher_CM = logits_CV if teacher_logits_CM is None else teacher_logits_CM
    weights_C = statistics.log_z if kd_weights_C is None else temperature * kd_weights_C
    if divergence is None:  # the mean slope of the forward KL is -1
        slopes_C = torch.full_like(statistics.kl, -1.0)
        divergence = DivergenceStatistics(statistics.common_log_z, statistics.teacher_log_z, statistics.kl, slopes_C)
    if not num_rows:
        return
    _gradient_kernel[(num_rows, triton.cdiv(num_columns, GRADIENT_BLOCK))](
        logits_CV,
        teacher_CM,
        statistics.log_z if targets_C is None else targets_C,
        weights_C,
        statistics.log_z,
        divergence.log_z,
        divergence.teacher_log_z,
        divergence.mean_slope,
        num_columns,
        teacher_CM.shape[1],
        logits_CV.stride(0),
        teacher_CM.stride(0),
        squash.scale,
        squash.cap,
        teacher_squash.scale,
        teacher_squash.cap,
        lm_weight,
        1.0 / temperature,
        share,
        KIND=KINDS.index(kind),
        HAS_TEACHER=teacher_logits_CM is not None,
        HAS_TARGETS=targets_C is not None and lm_weight != 0,
        CAPPED=squash.cap > 0,
        TEACHER_CAPPED=teacher_squash.cap > 0,
        BLOCK=GRADIENT_BLOCK,
        num_warps=GRADIENT_WARPS,
    )


@triton.jit
def _tanh(x: Any) -> Any:
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _squashed(raw: Any, scale: Any, cap: Any, CAPPED: tl.constexpr) -> Any:
    logits = raw.to(tl.float32) * scale
    if CAPPED:
        logits = cap * _tanh(logits / cap)
    return logits


@triton.jit
def _log_of_mixture(log_a: Any, log_b: Any, share: Any) -> Any:
    """``log(share a + (1 - share) b)``"""
    a = log_a + tl.log(share)
    b = log_b + tl.log(1 - share)
    return tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _divergence_terms(log_p: Any, log_q: Any, share: Any, KIND: tl.constexpr) -> Any:
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
        log_m = _log_of_mixture(log_p, log_q, share)
        slope = (1 - share) * q * (log_q - log_m)
        term = share * p * (log_p - log_m) + slope
    elif KIND == 3:
        log_m = _log_of_mixture(log_p, log_q, share)
        term = p * (log_p - log_m)
        slope = -(1 - share) * tl.exp(log_p + log_q - log_m)
    elif KIND == 4:
        log_m = _log_of_mixture(log_q, log_p, share)
        term = q * (log_q - log_m)
        slope = term - share * tl.exp(2 * log_q - log_m)
    else:
        term = 0.5 * tl.abs(p - q)
        slope = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    return term, slope


@triton.jit
def _statistics_kernel(
    student_pointer: Any,
    teacher_pointer: Any,
    targets_pointer: Any,
    found_pointer: Any,
    num_rows: Any,
    num_columns: Any,
    num_common: Any,
    student_stride: Any,
    teacher_stride: Any,
    scale: Any,
    cap: Any,
    teacher_scale: Any,
    teacher_cap: Any,
    HAS_TEACHER: tl.constexpr,
    SHORTER: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
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
        logits = tl.where(inside, _squashed(raw, scale, cap, CAPPED), -1.0e30)
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
            t_logits = tl.where(common, _squashed(t_raw, teacher_scale, teacher_cap, TEACHER_CAPPED), -1.0e30)
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
    chosen = _squashed(tl.load(student_row + target), scale, cap, CAPPED)
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
        t_chosen = _squashed(t_raw, teacher_scale, teacher_cap, TEACHER_CAPPED) - t_log_z
        tl.store(found_pointer + 4 * num_rows + row, log_z)
        tl.store(found_pointer + 5 * num_rows + row, t_log_z)
        tl.store(found_pointer + 6 * num_rows + row, t_log_z - tl.sum(t_weighted, axis=0) / t_total)
        tl.store(found_pointer + 7 * num_rows + row, tl.where(known, t_chosen, float("-inf")))
        tl.store(found_pointer + 8 * num_rows + row, tl.cast(t_top, tl.float32))
        tl.store(found_pointer + 9 * num_rows + row, tl.sum(apart, axis=0) / t_total - t_log_z + log_z)


@triton.jit
def _gradient_kernel(
    student_pointer: Any,
    teacher_pointer: Any,
    targets_pointer: Any,
    weights_pointer: Any,
    log_z_pointer: Any,
    common_pointer: Any,
    teacher_z_pointer: Any,
    slopes_pointer: Any,
    num_columns: Any,
    num_common: Any,
    student_stride: Any,
    teacher_stride: Any,
    scale: Any,
    cap: Any,
    teacher_scale: Any,
    teacher_cap: Any,
    lm_weight: Any,
    coldness: Any,
    share: Any,
    KIND: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    place = student_pointer + row * student_stride + columns
    logits = _squashed(tl.load(place, mask=inside, other=0.0), scale, cap, CAPPED)
    gradient = tl.zeros([BLOCK], tl.float32)
    if HAS_TARGETS:
        target = tl.load(targets_pointer + row)
        gradient = lm_weight * (tl.exp(logits - tl.load(log_z_pointer + row)) - tl.where(columns == target, 1.0, 0.0))
    if HAS_TEACHER:
        common = columns < num_common
        raw = tl.load(teacher_pointer + row * teacher_stride + columns, mask=common, other=0.0)
        t_logits = _squashed(raw, teacher_scale, teacher_cap, TEACHER_CAPPED)
        log_q = logits * coldness - tl.load(common_pointer + row)
        log_p = tl.maximum(t_logits * coldness - tl.load(teacher_z_pointer + row), -1.0e4)
        _, slope = _divergence_terms(log_p, log_q, share, KIND)
        slope -= tl.exp(log_q) * tl.load(slopes_pointer + row)
        gradient += tl.where(common, tl.load(weights_pointer + row) * slope, 0.0)
    if CAPPED:
        gradient *= 1 - (logits / cap) * (logits / cap)
    tl.store(place, (gradient * scale).to(student_pointer.dtype.element_ty), mask=inside)


@triton.jit
def _divergence_kernel(
    student_pointer: Any,
    teacher_pointer: Any,
    found_pointer: Any,
    num_rows: Any,
    num_common: Any,
    student_stride: Any,
    teacher_stride: Any,
    scale: Any,
    cap: Any,
    teacher_scale: Any,
    teacher_cap: Any,
    coldness: Any,
    share: Any,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    student_row = student_pointer + row * student_stride
    teacher_row = teacher_pointer + row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    highest = -1.0e30
    t_highest = -1.0e30
    sums = tl.zeros([BLOCK], tl.float32)
    t_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_common, BLOCK):
        columns = start + lanes
        inside = columns < num_common
        raw = tl.load(student_row + columns, mask=inside, other=0.0)
        t_raw = tl.load(teacher_row + columns, mask=inside, other=0.0)
        logits = tl.where(inside, _squashed(raw, scale, cap, CAPPED) * coldness, -1.0e30)
        t_logits = _squashed(t_raw, teacher_scale, teacher_cap, TEACHER_CAPPED) * coldness
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
        log_q = _squashed(raw, scale, cap, CAPPED) * coldness - log_z
        log_p = _squashed(t_raw, teacher_scale, teacher_cap, TEACHER_CAPPED) * coldness - t_log_z
        term, slope = _divergence_terms(tl.maximum(log_p, -1.0e4), log_q, share, KIND)
        values += tl.where(inside, term, 0.0)
        slopes += tl.where(inside, slope, 0.0)
    tl.store(found_pointer + row, log_z)
    tl.store(found_pointer + num_rows + row, t_log_z)
    tl.store(found_pointer + 2 * num_rows + row, tl.sum(values, 0))
    tl.store(found_pointer + 3 * num_rows + row, tl.sum(slopes, 0))
