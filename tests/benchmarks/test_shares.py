"""Stacks are told apart, and a thread that is watched is seen where it is."""

import time

import pytest

from moevlm.benchmarks.shares import MODEL_MATH, describe, part_of, sampled

TRAIN = [("lightning/trainer.py", "fit"), ("experiments/train.py", "main")]
STEP = [("lightning_modules/stage.py", "training_step"), *TRAIN]


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        (
            [("moevlm/models/vlm.py", "forward"), ("lightning_modules/base.py", "compute_losses"), *STEP],
            "forward and losses",
        ),
        ([("torch/autograd/graph.py", "_engine"), ("torch/autograd/__init__.py", "backward"), *STEP], "backward"),
        ([("torch/optim/adamw.py", "step"), *STEP], "optimizer"),
        ([("moevlm/preprocessing/collate.py", "pack"), ("datamodules/steps.py", "__getitem__"), *TRAIN], "data"),
        ([("lightning_modules/callbacks/checkpoint.py", "save"), *TRAIN], "checkpoints"),
        ([("torch/utils/checkpoint.py", "checkpoint"), ("m.py", "compute_losses"), *STEP], "forward and losses"),
        ([("lightning_modules/loggers.py", "log_metrics"), *TRAIN], "logging"),
        ([("lightning_modules/stage.py", "log_means"), *STEP], "rest of a step"),
        (TRAIN, "rest of fit"),
        ([("experiments/train.py", "main")], "start and end"),
    ],
)
def test_a_stack_belongs_to_one_part(stack: list[tuple[str, str]], part: str) -> None:
    assert part_of(stack) == part


def compute_losses() -> None:
    time.sleep(0.2)


def test_a_function_is_seen_for_as_long_as_it_runs() -> None:
    with sampled(0.005) as samples:
        compute_losses()
    assert samples.shares()["forward and losses"] > 0.5
    assert "model math" in describe(samples, 0.2)
    assert set(samples.shares()) <= {*MODEL_MATH, "start and end"}
