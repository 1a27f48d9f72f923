"""Divergences between the next-token distributions of a teacher and a student."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moevlm.batch import Head
from moevlm.losses.chunked import sum_over_rows
from moevlm.losses.mean import Mean

LogDivergence = Callable[[Tensor, Tensor, float], Tensor]
"""(log p [C, V] of the teacher, log q [C, V] of the student, beta) -> [C] nats."""


def forward_kl(log_p_CV: Tensor, log_q_CV: Tensor, beta: float = 0.5) -> Tensor:
    """``KL(p || q) = sum_v p (log p - log q)``; `beta` is not used. LLaVA-MoD (arXiv:2408.15881)."""
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(dim=-1)


def reverse_kl(log_p_CV: Tensor, log_q_CV: Tensor, beta: float = 0.5) -> Tensor:
    """``KL(q || p)``, which seeks modes; `beta` is not used. MiniLLM (arXiv:2306.08543)."""
    return forward_kl(log_q_CV, log_p_CV)


def jensen_shannon(log_p_CV: Tensor, log_q_CV: Tensor, beta: float = 0.5) -> Tensor:
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``. GKD (arXiv:2306.13649), Eq. 1.

    It vanishes linearly as `beta` goes to 0 or 1 (JSD / beta tends to KL(p || q) as beta tends to 0): another beta is
    another scale of the loss.
    """
    log_m_CV = torch.logaddexp(log_p_CV + math.log(beta), log_q_CV + math.log1p(-beta))
    return beta * forward_kl(log_p_CV, log_m_CV) + (1 - beta) * forward_kl(log_q_CV, log_m_CV)


DIVERGENCES: dict[str, LogDivergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jensen_shannon}


def check_divergence(divergence: str, temperature: float, beta: float) -> None:
    """Raise a ValueError for a choice that `token_kl` does not know; constructors call it before any data is read."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {sorted(DIVERGENCES)}, got {divergence!r}; set stage.divergence")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; set stage.temperature")
    if not 0 < beta < 1:
        raise ValueError(f"beta of the divergence must lie in (0, 1), got {beta}; set stage.divergence_beta")


def token_kl(
    student_rows_RD: Tensor,
    student_head: Head,
    teacher_rows_RD: Tensor,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    chunk_size: int = 256,
) -> Mean:
    """``tau^2 * sum_r D(softmax(z_T / tau), softmax(z_S / tau))`` over rows r; nats at tau = 1.

    A true divergence: the teacher's entropy is subtracted, so equal logits cost 0 (LLaVA-MoD's code reports the
    cross-entropy, with the same gradient). tau^2 keeps the gradient's scale (Hinton et al., arXiv:1503.02531). Both
    distributions are over the common part of the vocabularies, cut before the softmax: backbones of one family pad
    theirs to other widths. Each model gathers its own rows with its own `VLMOutput.prediction_rows`, since the two may
    see another number of visual tokens.

    Args:
        student_rows_RD: hidden states of the rows that predict the R supervised tokens; gradient.
        student_head: gradient.
        teacher_rows_RD: the same tokens' rows in the teacher, of its own width; no gradient.
        teacher_head: no gradient.
        temperature: tau.
        divergence: a key of DIVERGENCES.
        beta: of "jsd" only.
        chunk_size: rows whose logits exist at the same time.

    Returns:
        Sum over rows, R, unit "targets".

    Raises:
        ValueError: unknown divergence, temperature or beta out of range, another number of rows.
    """
    check_divergence(divergence, temperature, beta)
    if student_rows_RD.shape[0] != teacher_rows_RD.shape[0]:
        raise ValueError(f"{student_rows_RD.shape[0]} student rows, {teacher_rows_RD.shape[0]} teacher rows")
    num_common = min(student_head.weight.shape[0], teacher_head.weight.shape[0])
    distance = DIVERGENCES[divergence]

    def chunk_loss(logits_CV: Tensor, chunk: slice) -> Tensor:
        with torch.no_grad():
            teacher_logits_CV = teacher_head.logits(teacher_rows_RD[chunk])[:, :num_common]
            log_p_CV = torch.log_softmax(teacher_logits_CV / temperature, dim=-1)
        log_q_CV = torch.log_softmax(logits_CV[:, :num_common] / temperature, dim=-1)
        return distance(log_p_CV, log_q_CV, beta).sum()

    total = sum_over_rows(student_rows_RD, student_head, chunk_loss, chunk_size=chunk_size)
    return Mean(total * temperature**2, student_rows_RD.shape[0], "targets")
