"""A teacher's and a student's next-token distributions compared, and the cross-entropy, in one pass over rows."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from moevlm.batch import Head
from moevlm.losses.chunked import sum_over_rows
from moevlm.losses.divergences import Divergence
from moevlm.losses.fused import fused_rows, is_fused, knows
from moevlm.losses.teacher_rows import HeadRows, LogitsChunk, TeacherChunk, TeacherRows

WEIGHTINGS = ("uniform", "teacher_certainty", "student_uncertainty", "teacher_correctness")
"""How much a row's divergence counts: w_r in [0, 1] without gradient. Sums are divided by rows, not by these weights.

uniform                1
teacher_certainty      ``1 - H(p) / log V``: where the teacher knows what comes (DWA-KD, arXiv:2602.21669)
student_uncertainty    ``H(q) / log V``: where the student does not (the other half of DWA-KD's rule)
teacher_correctness    ``p(target)``, ours: a teacher is followed as far as it believes the given answer
"""


@dataclass(frozen=True)
class TokenLosses:
    """The two losses of each row, and what telemetry wants to know; only `joint` carries a gradient."""

    joint: Tensor  # scalar: sum over rows of kd_weight * w_r * D_r + lm_weight * CE_r
    kd: Tensor  # [R] w_r * D_r, the divergence as trained
    lm: Tensor  # [R] cross-entropy, nats; zeros without targets
    kl: Tensor  # [R] KL(teacher || student) at temperature 1, nats, whatever divergence trains
    agreement: Tensor  # [R] 1 where both models choose the same token, else 0
    student_entropy: Tensor  # [R] nats
    teacher_entropy: Tensor  # [R] nats
    kd_gradient_square: Tensor  # [R] squared norm of the gradient of w_r D_r to the row's logits; 0 unless asked for
    lm_gradient_square: Tensor  # [R] of the cross-entropy
    measured: bool = False  # whether the gradient squares were asked for

    def telemetry(self) -> dict[str, Tensor]:
        """[R] values by the name under which their mean is logged."""
        measured = {"kd_gradient_square": self.kd_gradient_square, "lm_gradient_square": self.lm_gradient_square}
        return {
            "teacher_kl": self.kl,
            "teacher_agreement": self.agreement,
            "student_entropy": self.student_entropy,
            "teacher_entropy": self.teacher_entropy,
        } | (measured if self.measured else {})


def token_losses(
    student_rows_RD: Tensor,
    student_head: Head,
    teacher: TeacherRows,
    targets_R: Tensor | None = None,
    *,
    divergence: Divergence = Divergence(),  # noqa: B008  (frozen)
    weighting: str = "uniform",
    kd_weight: float = 1.0,
    lm_weight: float = 0.0,
    measure_gradients: bool = False,
    chunk_size: int = 256,
    kernel: str = "auto",
) -> TokenLosses:
    """``kd_weight * sum_r w_r D(p_r, q_r) + lm_weight * sum_r -log q_r(target_r)`` over rows r, in chunks of rows.

    A true divergence: the teacher's entropy is subtracted, so equal logits cost 0 (LLaVA-MoD's code reports the
    cross-entropy, with the same gradient). Each model gathers its own rows with its own `VLMOutput.prediction_rows`,
    since the two may see another number of visual tokens.

    The forward KL at temperature 1 and the cross-entropy share one softmax and one gradient of the logits,
    ``(kd_weight + lm_weight) q - (kd_weight p + lm_weight onehot)``. That gradient, already weighted, is all that is
    kept, which is why the weights are needed here and not only by the caller.

    Args:
        student_rows_RD: hidden states of the rows that predict the R tokens; gradient.
        student_head: gradient, unless frozen.
        teacher: of the same R tokens.
        targets_R: the tokens; needed for lm_weight > 0 and weighting "teacher_correctness".
        divergence: which, and its temperature.
        weighting: one of WEIGHTINGS.
        kd_weight: of the divergence.
        lm_weight: of the cross-entropy, which is over the student's whole vocabulary.
        measure_gradients: fill in the gradient squares, at the price of more passes over a chunk's logits.
        chunk_size: rows whose logits exist at the same time; the fused path has a size of its own.
        kernel: one of `moevlm.losses.fused.KERNELS`. Fused are the divergences of distributions from a teacher's head,
            and the cross-entropy beside them; stored rows, logit_mse, z-normed logits and measured gradients take the
            plain path under "auto" and "fused" alike.

    Returns:
        Sums are not divided; no row gives 0 and gradients of 0.

    Raises:
        ValueError: another number of rows, an unknown weighting or kernel, or targets missing.
    """
    if student_rows_RD.shape[0] != teacher.num_rows:
        raise ValueError(f"{student_rows_RD.shape[0]} student rows, {teacher.num_rows} teacher rows")
    check_weighting(weighting)
    if targets_R is None and (lm_weight > 0 or weighting == "teacher_correctness"):
        raise ValueError(f"lm_weight {lm_weight} and weighting {weighting!r} need the tokens that the rows predict")
    is_known = knows(divergence) and not measure_gradients
    if is_fused(kernel, student_rows_RD) and is_known and isinstance(teacher, HeadRows):
        weights = (kd_weight, lm_weight)
        return _fused_losses(student_rows_RD, student_head, teacher, targets_R, divergence, weighting, weights)
    values: list[Tensor] = []

    def chunk_loss(logits_CV: Tensor, rows: slice) -> Tensor:
        targets_C = None if targets_R is None else targets_R[rows]
        loss, values_CM = _chunk_losses(
            logits_CV, teacher.chunk(rows), targets_C, divergence, weighting, (kd_weight, lm_weight), measure_gradients
        )
        values.append(values_CM)
        return loss

    joint = sum_over_rows(student_rows_RD, student_head, chunk_loss, chunk_size=chunk_size)
    empty = torch.zeros(0, 8, device=student_rows_RD.device)
    columns: Any = torch.cat([empty, *values]).unbind(dim=1)
    return dataclasses.replace(TokenLosses(joint, *columns), measured=measure_gradients)


def _fused_losses(
    student_rows_RD: Tensor,
    student_head: Head,
    teacher: HeadRows,
    targets_R: Tensor | None,
    divergence: Divergence,
    weighting: str,
    weights: tuple[float, float],
) -> TokenLosses:
    """A divergence and the cross-entropy by `moevlm.losses.fused`."""
    vocab_size = student_head.weight.shape[0]

    def weigh(found: Any) -> Tensor:
        entropies = (found.teacher_entropy, found.entropy)
        return _row_weights(weighting, found.teacher_target.exp(), *entropies, vocab_size)

    joint, found, kd_R, weights_R = fused_rows(
        student_rows_RD,
        student_head,
        targets_R,
        lm_weight=weights[1],
        teacher_hidden_RD=teacher.hidden_states,
        teacher_head=teacher.head.cut(teacher.num_common),
        kd_weight=weights[0],
        divergence=divergence,
        weigh=weigh,
    )
    nothing_R = torch.zeros_like(found.kl)
    return TokenLosses(
        joint,
        kd=weights_R * kd_R,
        lm=nothing_R if targets_R is None else -found.target,
        kl=found.kl,
        agreement=(found.top1 == found.teacher_top1).float(),
        student_entropy=found.entropy,
        teacher_entropy=found.teacher_entropy,
        kd_gradient_square=nothing_R,
        lm_gradient_square=nothing_R,
    )


def check_weighting(weighting: str) -> None:
    """Raise a ValueError for a weighting that `token_losses` does not know."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"token_weighting must be one of {WEIGHTINGS}, got {weighting!r}; set stage.token_weighting")


def _chunk_losses(
    logits_CV: Tensor,
    teacher: TeacherChunk,
    targets_C: Tensor | None,
    divergence: Divergence,
    weighting: str,
    weights: tuple[float, float],
    measure: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted sum with its gradient, and [C, 8] values in the order of `TokenLosses`' rows."""
    kd_weight, lm_weight = weights
    with torch.no_grad():
        log_q_CV = torch.log_softmax(logits_CV, dim=-1)
        found = teacher.compare(log_q_CV)
        entropy_C = -(log_q_CV.exp() * log_q_CV).sum(dim=-1)
        agrees_C = log_q_CV.argmax(dim=-1) == found.top1
        lm_C = torch.zeros_like(entropy_C) if targets_C is None else -_chosen(log_q_CV, targets_C)
        belief_C = teacher.belief(targets_C) if targets_C is not None else torch.zeros_like(entropy_C)
        weights_C = _row_weights(weighting, belief_C, found.teacher_entropy, entropy_C, log_q_CV.shape[1])
    squares = [torch.zeros_like(lm_C)] * 2
    if measure:
        squares = _gradient_squares(logits_CV, log_q_CV, teacher, targets_C, divergence, weights_C)
    if divergence.is_plain_kl and isinstance(teacher, LogitsChunk):
        kd_C = weights_C * found.kl
        row_weights = (kd_weight * weights_C, lm_weight)
        loss = _SoftTarget.apply(logits_CV, log_q_CV, teacher.log_probs, targets_C, *row_weights)
        loss = loss + (kd_weight * kd_C + lm_weight * lm_C).sum()  # the function itself is worth 0
    else:
        del log_q_CV
        kd_C = weights_C * teacher.divergence(divergence, logits_CV)
        loss = kd_weight * kd_C.sum()
        if targets_C is not None and lm_weight > 0:
            loss = loss + lm_weight * cross_entropy(logits_CV, targets_C, reduction="sum")
    values = (kd_C.detach(), lm_C, found.kl, agrees_C.float(), entropy_C, found.teacher_entropy, *squares)
    return loss, torch.stack(values, dim=1)


@torch.no_grad()
def _gradient_squares(
    logits_CV: Tensor,
    log_q_CV: Tensor,
    teacher: TeacherChunk,
    targets_C: Tensor | None,
    divergence: Divergence,
    weights_C: Tensor,
) -> list[Tensor]:
    """Squared norms of each row's gradient to its logits, [C] each: of ``w_r D_r``, and of the cross-entropy."""
    with torch.enable_grad():
        leaf_CV = logits_CV.detach().requires_grad_()
        (kd_CV,) = torch.autograd.grad((weights_C * teacher.divergence(divergence, leaf_CV)).sum(), leaf_CV)
    kd_C = kd_CV.square().sum(dim=1)
    if targets_C is None:
        return [kd_C, torch.zeros_like(kd_C)]
    q_CV = log_q_CV.exp()  # |q - onehot|^2 = |q|^2 - 2 q_target + 1
    return [kd_C, q_CV.square().sum(dim=1) - 2 * _chosen(q_CV, targets_C) + 1]


def _row_weights(
    weighting: str, belief_C: Tensor, teacher_entropy_C: Tensor, student_entropy_C: Tensor, vocab_size: int
) -> Tensor:
    """[C] in [0, 1]; `belief_C` is the teacher's probability of the target."""
    if weighting == "teacher_certainty":
        return (1 - teacher_entropy_C / math.log(vocab_size)).clamp(0, 1)
    if weighting == "student_uncertainty":
        return (student_entropy_C / math.log(vocab_size)).clamp(0, 1)
    if weighting == "teacher_correctness":
        return belief_C
    return torch.ones_like(teacher_entropy_C)


def _chosen(log_probs_CV: Tensor, targets_C: Tensor) -> Tensor:
    return log_probs_CV.gather(1, targets_C[:, None]).squeeze(1)


class _SoftTarget(torch.autograd.Function):
    """0, with the gradient of ``sum_r kd_r KL(p_r || q_r) + lm CE_r`` to the logits, from one softmax.

    ``kd (q - p)`` on the columns that both models have, q renormalised there, and ``lm (q - onehot)`` on all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_CV: Tensor,
        log_q_CV: Tensor,
        log_p_CV: Tensor,
        targets_C: Tensor | None,
        kd_weights_C: Tensor,
        lm_weight: float,
    ) -> Tensor:
        if ctx.needs_input_grad[0]:
            num_common = log_p_CV.shape[1]
            grad_CV = log_q_CV.exp()
            common_C = grad_CV[:, :num_common].sum(dim=1) if num_common < grad_CV.shape[1] else 1.0
            scale_C1 = (kd_weights_C / common_C)[:, None]
            if num_common < grad_CV.shape[1]:
                grad_CV[:, num_common:] *= lm_weight
            grad_CV[:, :num_common] *= scale_C1 + lm_weight
            grad_CV[:, :num_common].addcmul_(log_p_CV.exp(), kd_weights_C[:, None], value=-1)
            if targets_C is not None and lm_weight > 0:
                grad_CV.scatter_add_(1, targets_C[:, None], torch.full_like(scale_C1, -lm_weight))
            ctx.grad = grad_CV
        return logits_CV.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.grad.mul_(grad_outputs[0]), None, None, None, None, None
