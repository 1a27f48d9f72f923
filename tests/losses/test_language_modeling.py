import math

import pytest
import torch
from torch.nn.functional import cross_entropy as dense_cross_entropy

from moevlm.batch import IGNORE_INDEX, Head
from moevlm.losses.chunked import sum_over_rows
from moevlm.losses.language_modeling import cross_entropy
from tests.losses.builders import double, double_logits, make_head, make_labels, make_output

HEADS = [{}, {"bias": True}, {"softcap": 5.0}, {"scale": 0.25}, {"bias": True, "softcap": 3.0, "scale": 2.0}]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_chunked_loss_and_gradients_equal_the_dense_ones_in_float64(options: dict, chunk_size: int) -> None:
    lengths, head = (5, 2, 9), make_head(11, 6, **options)
    hidden = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = make_labels(lengths, 11)
    loss = cross_entropy(make_output(hidden, lengths), head, labels, chunk_size=chunk_size)
    (0.7 * loss.sum).backward()

    reference_hidden, (weight, bias) = hidden.detach().double().requires_grad_(), double(head)
    rows = torch.nonzero(labels != IGNORE_INDEX).squeeze(1)
    logits = double_logits(reference_hidden[rows - 1], weight, bias, head)
    expected = dense_cross_entropy(logits, labels[rows], reduction="sum")
    (0.7 * expected).backward()

    assert loss.count == len(rows)
    torch.testing.assert_close(loss.sum.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), reference_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)
    if bias is not None:
        torch.testing.assert_close(head.bias.grad.double(), bias.grad, rtol=1e-4, atol=1e-5)


def test_uniform_logits_cost_log_vocabulary_a_target() -> None:
    head = Head(torch.zeros(7, 3))
    loss = cross_entropy(make_output(torch.randn(4, 3), (4,)), head, torch.tensor([IGNORE_INDEX, 1, 2, 3]))
    assert loss.sum.item() == pytest.approx(3 * math.log(7), rel=1e-6)


def test_a_batch_without_labels_gives_zero_and_zero_gradients() -> None:
    head, hidden = make_head(11, 6, bias=True), torch.randn(4, 6).requires_grad_()
    loss = cross_entropy(make_output(hidden, (4,)), head, torch.full((4,), IGNORE_INDEX))
    loss.sum.backward()
    assert (loss.sum.item(), loss.count) == (0.0, 0)
    for tensor in (hidden, head.weight, head.bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_the_token_before_the_answer_predicts_its_first_token() -> None:
    """A one-token answer: the row that gets the gradient is the question's last."""
    head, hidden = make_head(11, 6), torch.randn(4, 6).requires_grad_()
    labels = torch.tensor([IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 5])
    cross_entropy(make_output(hidden, (4,)), head, labels).sum.backward()
    assert hidden.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [2]


def test_an_image_before_the_answer_is_stepped_over() -> None:
    """Text is [question, image, answer]; the image becomes rows 1-3, so the last of them predicts the answer."""
    head, hidden = make_head(11, 6), torch.randn(5, 6).requires_grad_()
    output = make_output(hidden, (5,))
    output.text_positions = torch.tensor([0, 1, 4])
    cross_entropy(output, head, torch.tensor([IGNORE_INDEX, IGNORE_INDEX, 5])).sum.backward()
    assert hidden.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [3]


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    head, hidden = make_head(11, 6), torch.randn(4, 6).requires_grad_()
    head.weight.requires_grad_(False)
    cross_entropy(make_output(hidden, (4,)), head, make_labels((4,), 11)).sum.backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_no_chunk_sees_more_rows_than_asked_for() -> None:
    head, seen = make_head(11, 6), []

    def chunk_loss(logits: torch.Tensor, chunk: slice) -> torch.Tensor:
        seen.append(logits.shape[0])
        return logits.sum()

    sum_over_rows(torch.randn(10, 6), head, chunk_loss, chunk_size=4)
    assert seen == [4, 4, 2]


def test_autocast_runs_the_matrix_product_in_bfloat16_and_returns_gradients_in_the_inputs_dtype() -> None:
    head, hidden = make_head(11, 6), torch.randn(4, 6).requires_grad_()
    labels = make_labels((4,), 11)
    exact = cross_entropy(make_output(hidden, (4,)), head, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(make_output(hidden, (4,)), head, labels)
    loss.sum.backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.float32
    assert loss.sum.item() != exact.sum.item()
    torch.testing.assert_close(loss.sum, exact.sum, rtol=3e-2, atol=3e-2)


def test_chunk_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        sum_over_rows(torch.randn(2, 6), make_head(11, 6), lambda logits, _: logits.sum(), chunk_size=0)
