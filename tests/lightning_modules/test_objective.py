import pytest
import torch

from lightning_modules.objective import (
    Objective,
    Totals,
    check_weights,
    final_weight,
    is_ever_positive,
    step_seed,
    weight_at,
)
from moevlm.losses.mean import Mean


def test_a_schedule_is_linear_and_then_stays() -> None:
    schedule = {"start": 1.0, "end": 0.0, "steps": 4}
    assert [weight_at(schedule, step) for step in (0, 1, 4, 9)] == [1.0, 0.75, 0.0, 0.0]
    assert weight_at(0.5, 3) == 0.5
    assert (final_weight(schedule), final_weight(0.5)) == (0.0, 0.5)
    assert is_ever_positive(schedule)
    assert not is_ever_positive(0.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lmm": 1.0}, "unknown loss 'lmm'; this stage has lm, kd"),
        ({"lm": -1.0}, "must not be negative, got -1.0; set stage.loss_weights.lm"),
        ({"lm": {"start": 1.0, "end": 0.0}}, "needs start, end and steps"),
        ({"lm": {"start": 1.0, "end": 0.0, "steps": 0}}, "steps >= 1"),
    ],
)
def test_weights_of_the_wrong_form_are_refused(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights(weights, ["lm", "kd"])


def test_totals_divide_once_and_nothing_by_zero() -> None:
    totals = Totals()
    for value, count in ((6.0, 1), (0.0, 2)):
        losses = {"lm": Mean(torch.tensor(value), count, "targets")}
        totals.add(Objective(losses, {"empty": Mean(torch.tensor(0.0), 0, "pairs")}))
    assert {name: value.item() for name, value in totals.means().items()} == {"lm_loss": 2.0, "empty": 0.0}
    assert Totals().means() == {}


def test_step_seeds_are_stable_and_differ_by_each_argument() -> None:
    seeds = {step_seed(*arguments) for arguments in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(seeds) == 4
    torch.manual_seed(step_seed(3, 2, 1))
