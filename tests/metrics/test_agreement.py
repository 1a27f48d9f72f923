import math

import pytest
import torch

from moevlm.batch import Head
from moevlm.metrics.agreement import agreement_sums, entropy, top1_agreement


def test_entropy_of_uniform_logits_is_log_vocabulary() -> None:
    torch.testing.assert_close(entropy(torch.zeros(3, 7)), torch.full((3,), math.log(7)))


def test_agreement_looks_at_the_common_vocabulary_only() -> None:
    student, teacher = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0, 9.0], [0.0, 1.0, 9.0]])
    assert top1_agreement(student, teacher).tolist() == [True, False]


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_sums_do_not_depend_on_the_chunks(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 4, generator=generator), torch.randn(5, 6, generator=generator)
    student_head = Head(torch.randn(9, 4, generator=generator))
    teacher_head = Head(torch.randn(9, 6, generator=generator))
    sums = agreement_sums(student, student_head, teacher, teacher_head, chunk_size=chunk_size)
    student_logits, teacher_logits = student @ student_head.weight.T, teacher @ teacher_head.weight.T
    assert sums["teacher_agreement"] == (student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
    assert sums["student_entropy"].item() == pytest.approx(entropy(student_logits).sum().item(), rel=1e-5)
    assert sums["teacher_entropy"].item() == pytest.approx(entropy(teacher_logits).sum().item(), rel=1e-5)


def test_no_rows_sum_to_zero() -> None:
    sums = agreement_sums(torch.zeros(0, 4), Head(torch.zeros(3, 4)), torch.zeros(0, 4), Head(torch.zeros(3, 4)))
    assert [value.item() for value in sums.values()] == [0.0, 0.0, 0.0]
