import math

import pytest
import torch

from moevlm.losses.preference import (
    PREFERENCE_LOSSES,
    Preference,
    preference_loss,
    reward_metrics,
    split_pairs,
)

NO_KL = {"mismatched_kl": torch.tensor(0.0)}


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
    hinge = sum(max(0.0, 1 - beta * margin) for margin in margins)
    simpo = sum(-math.log(sigmoid(beta * margin - 0.3)) for margin in margins)
    expected_of = {"dpo": dpo, "ipo": ipo, "kto_pair": kto, "hinge": hinge, "simpo": simpo}
    for name, expected in expected_of.items():
        loss = preference_loss(chosen, rejected, Preference(name, beta, margin=0.3 if name == "simpo" else 0.0))
        assert (loss.count, loss.unit) == (2, "pairs")
        assert loss.sum.item() == pytest.approx(expected, rel=1e-6), name


def test_a_policy_that_equals_its_reference_pays_log_two_in_dpo_and_a_half_in_kto() -> None:
    zeros = torch.zeros(3)
    assert preference_loss(zeros, zeros, Preference("dpo")).sum.item() == pytest.approx(3 * math.log(2))
    assert preference_loss(zeros, zeros, Preference("kto_pair")).sum.item() == pytest.approx(1.5)
    assert preference_loss(zeros, zeros, Preference("kto"), **NO_KL).sum.item() == pytest.approx(1.5)


def test_the_reference_points_of_kto_carry_no_gradient() -> None:
    chosen, rejected = torch.tensor([2.0], requires_grad=True), torch.tensor([1.0])
    slope = 0.5 * sigmoid(0.5) * (1 - sigmoid(0.5)) / 2  # of the desirable half alone; the reference point is constant
    preference_loss(chosen, rejected, Preference("kto_pair", 0.5)).sum.backward()
    assert chosen.grad.item() == pytest.approx(-slope, rel=1e-5)
    kl, chosen.grad = torch.tensor(1.0, requires_grad=True), None
    preference_loss(chosen, rejected, Preference("kto", 0.5), mismatched_kl=kl).sum.backward()
    assert chosen.grad.item() == pytest.approx(-slope, rel=1e-5)
    assert kl.grad is None


def test_kto_looks_at_the_mismatched_kl_from_above_only_and_weighs_its_halves() -> None:
    chosen, rejected, beta = torch.tensor([1.0]), torch.tensor([-2.0]), 0.5
    for kl in (0.8, -3.0):
        z = max(0.0, kl)
        expected = (2 * (1 - sigmoid(beta * (1.0 - z))) + 3 * (1 - sigmoid(beta * (z + 2.0)))) / 2
        settings = Preference("kto", beta, desirable_weight=2.0, undesirable_weight=3.0)
        loss = preference_loss(chosen, rejected, settings, mismatched_kl=torch.tensor(kl))
        assert loss.sum.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_no_pairs_give_zero_not_nan(name: str) -> None:
    empty = torch.zeros(0, requires_grad=True)
    extra = NO_KL if name == "kto" else {}
    assert preference_loss(empty, empty, Preference(name), **extra).sum.item() == 0.0


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "orpo"}, "loss must be one of"),
        ({"beta": 0}, "beta must be positive, got 0"),
        ({"margin": 1.0}, "margin 1.0 has no effect on 'dpo'"),
        ({"loss": "simpo", "margin": -1.0}, "margin must not be negative"),
        ({"desirable_weight": 2.0}, "is of 'kto' only, got 2.0; set stage.desirable_weight"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preference(**settings)


def test_rewards_are_beta_times_the_log_ratios() -> None:
    metrics = reward_metrics(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 4.0]), beta=0.5)
    values = {name: (mean.sum.item(), mean.count) for name, mean in metrics.items()}
    assert values == {
        "chosen_reward": (0.5, 2),
        "rejected_reward": (1.5, 2),
        "reward_margin": (-1.0, 2),
        "reward_accuracy": (1.0, 2),
    }
