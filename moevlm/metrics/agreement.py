"""How alike a student's and a teacher's next-token distributions are."""

from __future__ import annotations

import torch
from torch import Tensor

from moevlm.batch import Head


def entropy(logits_RV: Tensor) -> Tensor:
    """[R] Shannon entropy of ``softmax(logits)`` in nats; log V when uniform."""
    log_probs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    return -(log_probs_RV.exp() * log_probs_RV).sum(dim=-1)


def top1_agreement(student_logits_RV: Tensor, teacher_logits_RV: Tensor) -> Tensor:
    """[R] bool: both choose the same token; vocabularies are cut to their common part."""
    num_common = min(student_logits_RV.shape[-1], teacher_logits_RV.shape[-1])
    return student_logits_RV[:, :num_common].argmax(dim=-1) == teacher_logits_RV[:, :num_common].argmax(dim=-1)


@torch.no_grad()
def agreement_sums(
    student_rows_RD: Tensor, student_head: Head, teacher_rows_RD: Tensor, teacher_head: Head, *, chunk_size: int = 256
) -> dict[str, Tensor]:
    """Sums over rows of the top-1 agreement (how many rows) and of both entropies (nats), by name.

    Args:
        student_rows_RD: hidden states of the rows that predict the supervised tokens.
        student_head: makes the student's logits.
        teacher_rows_RD: the same tokens' rows in the teacher, of its own width.
        teacher_head: makes the teacher's logits.
        chunk_size: rows whose logits exist at the same time.

    Returns:
        "teacher_agreement", "student_entropy", "teacher_entropy"; each 0 when there is no row.
    """
    names = ("teacher_agreement", "student_entropy", "teacher_entropy")
    totals = torch.zeros(len(names), dtype=torch.float64, device=student_rows_RD.device)
    for start in range(0, student_rows_RD.shape[0], chunk_size):
        student_CV = student_head.logits(student_rows_RD[start : start + chunk_size])
        teacher_CV = teacher_head.logits(teacher_rows_RD[start : start + chunk_size])
        values = (top1_agreement(student_CV, teacher_CV), entropy(student_CV), entropy(teacher_CV))
        totals += torch.stack([value_C.double().sum() for value_C in values])
    return dict(zip(names, totals))
