import math

import pytest
import torch

from moevlm.batch import IGNORE_INDEX
from moevlm.losses.preference import preference_loss, reward_metrics, sequence_log_probs, split_pairs
from tests.losses.builders import double, double_logits, make_head, make_labels, make_output


@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_sequence_log_probs_and_gradients_equal_plain_loops_in_float64(
    length_normalised: bool, chunk_size: int
) -> None:
    lengths, head = (5, 3, 8), make_head(11, 6, bias=True, softcap=4.0)
    hidden = torch.randn(16, 6).requires_grad_()
    output, labels = make_output(hidden, lengths), make_labels(lengths, 11)
    weights = torch.tensor([1.0, -2.0, 0.5])
    log_probs = sequence_log_probs(
        output, head, labels, output.sequence_ids, length_normalised=length_normalised, chunk_size=chunk_size
    )
    (weights * log_probs).sum().backward()

    rows, (weight, bias) = hidden.detach().double().requires_grad_(), double(head)
    expected, start = [], 0
    for length in lengths:
        places = [t for t in range(start, start + length) if labels[t] != IGNORE_INDEX]
        logits = double_logits(rows, weight, bias, head)
        total = sum(torch.log_softmax(logits[t - 1], dim=-1)[labels[t]] for t in places)
        expected.append(total / len(places) if length_normalised else total)
        start += length
    (weights.double() * torch.stack(expected)).sum().backward()

    torch.testing.assert_close(log_probs.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), rows.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length_normalised", [False, True])
def test_a_batch_without_labels_has_log_probs_of_zero_and_zero_gradients(length_normalised: bool) -> None:
    head, hidden = make_head(11, 6), torch.randn(4, 6).requires_grad_()
    output = make_output(hidden, (3, 1))
    labels = torch.full((4,), IGNORE_INDEX)
    log_probs = sequence_log_probs(output, head, labels, output.sequence_ids, length_normalised=length_normalised)
    log_probs.sum().backward()
    assert log_probs.tolist() == [0.0, 0.0]
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_losses_have_their_closed_form_values() -> None:
    chosen, rejected, beta = torch.tensor([1.0, -0.5]), torch.tensor([-2.0, 0.25]), 0.5
    margins = [3.0, -0.75]
    dpo = sum(-math.log(sigmoid(beta * margin)) for margin in margins)
    ipo = sum((margin - 1.0) ** 2 for margin in margins)
    chosen_z, rejected_z = 0.25, 0.0  # max(0, mean)
    kto = sum(
        (1 - sigmoid(beta * (c - rejected_z)) + 1 - sigmoid(beta * (chosen_z - r))) / 2
        for c, r in zip(chosen.tolist(), rejected.tolist())
    )
    for name, expected in {"dpo": dpo, "ipo": ipo, "kto": kto}.items():
        loss = preference_loss(chosen, rejected, loss=name, beta=beta)
        assert (loss.count, loss.unit) == (2, "pairs")
        assert loss.sum.item() == pytest.approx(expected, rel=1e-6), name


def test_a_policy_that_equals_its_reference_pays_log_two_in_dpo_and_a_half_in_kto() -> None:
    zeros = torch.zeros(3)
    assert preference_loss(zeros, zeros, loss="dpo").sum.item() == pytest.approx(3 * math.log(2))
    assert preference_loss(zeros, zeros, loss="kto").sum.item() == pytest.approx(1.5)


def test_the_reference_points_of_kto_carry_no_gradient() -> None:
    chosen, rejected = torch.tensor([2.0], requires_grad=True), torch.tensor([1.0])
    preference_loss(chosen, rejected, loss="kto", beta=0.5).sum.backward()
    slope = 0.5 * sigmoid(0.5) * (1 - sigmoid(0.5)) / 2  # of the desirable half alone; z_chosen = 2 is a constant
    assert chosen.grad.item() == pytest.approx(-slope, rel=1e-5)


def test_no_pairs_give_zero_not_nan() -> None:
    empty = torch.zeros(0, requires_grad=True)
    for name in ("dpo", "ipo", "kto"):
        assert preference_loss(empty, empty, loss=name).sum.item() == 0.0


def test_pairs_are_matched_by_id_whatever_their_order_and_others_are_left_out() -> None:
    values = torch.tensor([10.0, 21.0, 99.0, 11.0, 20.0])
    chosen, rejected = split_pairs(
        values, torch.tensor([1, 2, -1, 1, 2]), torch.tensor([True, False, True, False, True])
    )
    assert chosen.tolist() == [10.0, 20.0]
    assert rejected.tolist() == [11.0, 21.0]


def test_half_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one chosen and one rejected .* got pairs \[1\] chosen and \[\] rejected"):
        split_pairs(torch.zeros(1), torch.tensor([1]), torch.tensor([True]))


def test_unknown_loss_and_beta_are_refused() -> None:
    with pytest.raises(ValueError, match="loss must be one of"):
        preference_loss(torch.zeros(1), torch.zeros(1), loss="simpo")
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        preference_loss(torch.zeros(1), torch.zeros(1), beta=0)


def test_rewards_are_beta_times_the_log_ratios() -> None:
    metrics = reward_metrics(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 4.0]), beta=0.5)
    values = {name: (mean.sum.item(), mean.count) for name, mean in metrics.items()}
    assert values == {
        "chosen_reward": (0.5, 2),
        "rejected_reward": (1.5, 2),
        "reward_margin": (-1.0, 2),
        "reward_accuracy": (1.0, 2),
    }
