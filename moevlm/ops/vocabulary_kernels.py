"""Triton kernels over rows of logits: what a loss needs to know of a row, and its gradient in the logits' own place.

One reading of the logits gives the statistics of both models (online softmax, arXiv:1805.02867), a second one turns the
student's logits into their gradient: 3 readings and 1 writing of (rows x vocabulary) for a distillation loss, where a
chain of torch operations takes some thirty. Sums are in float32 whatever the logits are in. `moevlm.losses.fused` has
the matrix products around; on a CPU the kernels run in Triton's interpreter, for tests only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moevlm.ops.kernels.vocabulary import divergence_kernel, gradient_kernel, scale_kernel, statistics_kernel

STATISTICS_BLOCK, STATISTICS_WARPS = 4096, 16
GRADIENT_BLOCK, GRADIENT_WARPS = 4096, 8
SCALE_BLOCK = 4096


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
        statistics_kernel[(num_rows,)](
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
    known: RowStatistics | None = None,
) -> DivergenceStatistics:
    """Two passes over the logits of C rows: partition sums at the temperature, then the divergence.

    Args:
        kind: of KINDS.
        share: beta of "jsd", the skew of the skewed ones.
        known: of these rows; at temperature 1 they have the partition sums, and the first pass is left out.
    """
    num_rows, num_common = teacher_logits_CM.shape
    found_FC = torch.zeros(len(DivergenceStatistics._fields), num_rows, dtype=torch.float32, device=logits_CV.device)
    is_summed = known is not None and temperature == 1.0
    if num_rows:
        divergence_kernel[(num_rows,)](
            logits_CV,
            teacher_logits_CM,
            found_FC if known is None else known.common_log_z,
            found_FC if known is None else known.teacher_log_z,
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
            IS_SUMMED=is_summed,
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
    gradient_kernel[(num_rows, triton.cdiv(num_columns, GRADIENT_BLOCK))](
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


def scale_in_place(values: Tensor, factor: Tensor) -> Tensor:
    """``values *= factor``, a scalar on the same device; torch reads bfloat16 one by one for a float32 factor."""
    if not values.is_contiguous():
        return values.mul_(factor)
    if values.numel():
        scale_kernel[(triton.cdiv(values.numel(), SCALE_BLOCK),)](values, factor, values.numel(), BLOCK=SCALE_BLOCK)
    return values
