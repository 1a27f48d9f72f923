"""Learning-rate schedules as plain `LambdaLR`, stepped once per optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: Optimizer,
    *,
    num_steps: int,
    warmup_fraction: float | None = None,
    num_warmup_steps: int | None = None,
    min_fraction: float = 0.0,
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to ``min_fraction`` of the learning rate at `num_steps`.

    With w warm-up steps, step s (from 0) runs at ``(s + 1) / w`` of the rate while s < w, so the first step is not
    lost; then at ``m + (1 - m) (1 + cos(pi (s - w) / (num_steps - w))) / 2``. The schedule of LLaVA
    and MoE-LLaVA (there w is 3 % of the steps and m = 0; theirs starts at 0).

    Raises:
        ValueError: both or neither of the two warm-up settings, or a value out of range.
    """
    if (warmup_fraction is None) == (num_warmup_steps is None):
        raise ValueError("give exactly one of scheduler.warmup_fraction and scheduler.num_warmup_steps")
    if warmup_fraction is not None:
        if not 0 <= warmup_fraction < 1:
            raise ValueError(
                f"warmup_fraction must lie in [0, 1), got {warmup_fraction}; set scheduler.warmup_fraction"
            )
        num_warmup_steps = math.ceil(warmup_fraction * num_steps)
    assert num_warmup_steps is not None
    if not 0 <= num_warmup_steps <= num_steps:
        raise ValueError(
            f"num_warmup_steps must lie in [0, num_steps={num_steps}], got {num_warmup_steps}; "
            "set scheduler.num_warmup_steps"
        )
    if not 0 <= min_fraction <= 1:
        raise ValueError(f"min_fraction must lie in [0, 1], got {min_fraction}; set scheduler.min_fraction")

    def fraction_at(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        progress = min(1.0, (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
        return min_fraction + (1 - min_fraction) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, fraction_at)


def constant(optimizer: Optimizer, *, num_warmup_steps: int = 0) -> LambdaLR:
    """Linear warm-up over `num_warmup_steps`, then the full learning rate.

    Raises:
        ValueError: a negative number of steps.
    """
    if num_warmup_steps < 0:
        raise ValueError(
            f"num_warmup_steps must not be negative, got {num_warmup_steps}; set scheduler.num_warmup_steps"
        )
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, num_warmup_steps)))
