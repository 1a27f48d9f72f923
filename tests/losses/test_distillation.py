import math

import pytest
import torch

from moevlm.losses.distillation import DIVERGENCES, token_kl
from tests.losses.builders import double, double_logits, make_head


def reference(log_p: torch.Tensor, log_q: torch.Tensor, divergence: str, beta: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for log_p_row, log_q_row in zip(log_p, log_q):
        for a, b in zip(log_p_row, log_q_row):
            p, q = a.exp(), b.exp()
            m = beta * p + (1 - beta) * q
            if divergence == "forward_kl":
                total = total + p * (a - b)
            elif divergence == "reverse_kl":
                total = total + q * (b - a)
            else:
                total = total + beta * p * (a - m.log()) + (1 - beta) * q * (b - m.log())
    return total


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize(("temperature", "chunk_size"), [(1.0, 2), (2.0, 100)])
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 4.0, "scale": 0.5}])
def test_divergence_and_gradients_equal_plain_loops_in_float64(
    divergence: str, temperature: float, chunk_size: int, options: dict
) -> None:
    student_head, teacher_head = make_head(9, 4, seed=1, **options), make_head(12, 7, seed=2, **options)
    student, teacher = torch.randn(5, 4).requires_grad_(), torch.randn(5, 7)
    loss = token_kl(
        student, student_head, teacher, teacher_head,
        temperature=temperature, divergence=divergence, beta=0.3, chunk_size=chunk_size,
    )  # fmt: skip
    loss.sum.backward()

    rows, (weight, bias) = student.detach().double().requires_grad_(), double(student_head)
    log_q = torch.log_softmax(double_logits(rows, weight, bias, student_head) / temperature, dim=-1)
    teacher_logits = double_logits(teacher.double(), *double(teacher_head), teacher_head)[:, :9]
    log_p = torch.log_softmax(teacher_logits / temperature, dim=-1).detach()
    expected = temperature**2 * reference(log_p, log_q, divergence, 0.3)
    expected.backward()

    assert (loss.count, loss.unit) == (5, "targets")
    torch.testing.assert_close(loss.sum.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.grad.double(), rows.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(student_head.weight.grad.double(), weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_equal_distributions_cost_nothing_and_give_no_gradient(divergence: str) -> None:
    head, rows = make_head(9, 4), torch.randn(5, 4).requires_grad_()
    loss = token_kl(rows, head, rows.detach(), head, divergence=divergence)
    loss.sum.backward()
    assert loss.sum.item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(rows.grad, torch.zeros_like(rows), atol=1e-6, rtol=0)


def test_padding_columns_of_a_wider_vocabulary_change_nothing() -> None:
    student_head, teacher_head = make_head(9, 4, seed=1), make_head(9, 7, seed=2)
    student, teacher = torch.randn(5, 4), torch.randn(5, 7)
    exact = token_kl(student, student_head, teacher, teacher_head)
    teacher_head.weight = torch.cat([teacher_head.weight, 10 * torch.randn(3, 7)])
    padded = token_kl(student, student_head, teacher, teacher_head)
    assert padded.sum.item() == pytest.approx(exact.sum.item(), rel=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(5, 4).requires_grad_(), torch.randn(5, 7).requires_grad_()
    teacher_head = make_head(9, 7, seed=2)
    token_kl(student, make_head(9, 4), teacher, teacher_head).sum.backward()
    assert teacher.grad is None
    assert teacher_head.weight.grad is None


def test_no_rows_give_zero_and_zero_gradients() -> None:
    head, rows = make_head(9, 4), torch.randn(0, 4).requires_grad_()
    loss = token_kl(rows, head, torch.randn(0, 7), make_head(9, 7))
    loss.sum.backward()
    assert (loss.sum.item(), loss.count) == (0.0, 0)
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_jensen_shannon_of_disjoint_distributions_is_the_entropy_of_the_mixture_weights() -> None:
    head = make_head(2, 2)
    head.weight = 200 * torch.eye(2)
    rows_p, rows_q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    loss = token_kl(rows_q, head, rows_p, head, divergence="jsd", beta=0.25)
    assert loss.sum.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"divergence": "jsd", "beta": 1.0}, r"must lie in \(0, 1\), got 1.0"),
    ],
)
def test_unknown_choices_are_refused(options: dict, message: str) -> None:
    head = make_head(9, 4)
    with pytest.raises(ValueError, match=message):
        token_kl(torch.randn(1, 4), head, torch.randn(1, 4), head, **options)
