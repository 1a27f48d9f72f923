"""Parameter groups and learning-rate schedules."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_modules.parameters import build_optimizer
from lightning_modules.schedules import constant, warmup_cosine

adamw = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(2, 3, bias=False)
        self.linear = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(3)
        self.experts_bias = nn.Parameter(torch.zeros(4, 3))
        self.frozen = nn.Linear(2, 3).requires_grad_(False)


def test_weight_decay_reaches_matrices_only_and_frozen_parameters_nothing() -> None:
    model = Model()
    optimizer = build_optimizer(adamw, model, {})
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    plain = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model.router.weight), id(model.linear.weight)}
    assert plain == {id(model.linear.bias), id(model.norm.weight), id(model.norm.bias), id(model.experts_bias)}


def test_multipliers_change_the_learning_rate_of_what_they_name() -> None:
    model = Model()
    optimizer = build_optimizer(adamw, model, {"router": 5.0})
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.router.weight)] == pytest.approx(0.5)
    assert rates[id(model.linear.weight)] == pytest.approx(0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    scheduler = constant(optimizer, num_warmup_steps=2)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.25)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [({"gate": 2.0}, "'gate' .* matches no trainable parameter"), ({"router": 0.0}, "positive")],
)
def test_multipliers_without_effect_or_meaning_are_refused(multipliers: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(adamw, Model(), multipliers)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter trains"):
        build_optimizer(adamw, Model().requires_grad_(False), {})


def rates(schedule: partial, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler, values = schedule(optimizer), []
    for _ in range(num_steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_warmup_rises_to_the_rate_and_the_cosine_falls_to_the_minimum() -> None:
    values = rates(partial(warmup_cosine, num_steps=6, num_warmup_steps=2, min_fraction=0.1), 8)
    assert values[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert values[4] == pytest.approx(0.5 * (2.0 + 0.2))
    assert values[6:] == pytest.approx([0.2, 0.2])
    assert all(before >= after for before, after in pairwise(values[2:]))


def test_a_fraction_of_warmup_is_rounded_up() -> None:
    assert rates(partial(warmup_cosine, num_steps=10, warmup_fraction=0.11), 2) == pytest.approx([1.0, 2.0])
    assert rates(partial(warmup_cosine, num_steps=10, warmup_fraction=0.0), 1) == pytest.approx([2.0])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (partial(warmup_cosine, num_steps=4), "exactly one of"),
        (partial(warmup_cosine, num_steps=4, warmup_fraction=1.0), r"\[0, 1\), got 1.0"),
        (partial(warmup_cosine, num_steps=4, num_warmup_steps=5), r"\[0, num_steps=4\], got 5"),
        (
            partial(warmup_cosine, num_steps=4, num_warmup_steps=1, min_fraction=2.0),
            r"min_fraction must lie in \[0, 1\]",
        ),
        (partial(constant, num_warmup_steps=-1), "must not be negative"),
    ],
)
def test_schedules_out_of_range_are_refused(schedule: partial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(schedule, 1)
