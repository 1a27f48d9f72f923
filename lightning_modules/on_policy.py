"""On-policy distillation: in a share of the steps the student answers for itself, and is corrected there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_modules.objective import step_seed, sum_over_ranks
from moevlm.batch import VLMBatch
from moevlm.evaluation.regenerate import regenerate
from moevlm.models.vlm import VLM

ALL_RANKS = -1
"""In place of a rank, for what every rank must decide alike."""


@dataclass(frozen=True)
class OnPolicy:
    """GKD's share of batches that the student generates (arXiv:2306.13649, Algorithm 1).

    Attributes:
        fraction: lambda, the probability that a step is on-policy; 0 is supervised distillation.
        max_new_tokens: longest answer.
        temperature: of the student's draws.
    """

    fraction: float
    max_new_tokens: int = 64
    temperature: float = 1.0

    @classmethod
    def parse(cls, values: Mapping[str, Any] | None) -> OnPolicy:
        """From a config's mapping; of no step for none."""
        if not values:
            return cls(0.0)
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown or "fraction" not in values:
            raise ValueError(
                f"stage.on_policy needs fraction and knows {', '.join(cls.__dataclass_fields__)}, got {dict(values)}"
            )
        settings = cls(**values)
        if not 0 <= settings.fraction <= 1 or settings.max_new_tokens < 1 or settings.temperature < 0:
            raise ValueError(
                "on_policy needs fraction in [0, 1], max_new_tokens >= 1 and temperature >= 0, got "
                f"{dict(values)}; set stage.on_policy"
            )
        return settings

    def is_drawn(self, seed: int, step: int) -> bool:
        """Whether a step is on-policy: a pure function of seed and step, the same on every rank and after a resume."""
        generator = torch.Generator().manual_seed(step_seed(seed, ALL_RANKS, step))
        return bool(torch.rand((), generator=generator) < self.fraction)

    def answer_step(
        self, model: VLM, micro_batches: Sequence[VLMBatch], seed: int, rank: int, step: int
    ) -> list[VLMBatch]:
        """The micro-batches of one step with the student's own answers; what it draws is a function of all numbers."""
        seeds = [step_seed(seed + 1, rank, step * 1009 + number) for number in range(len(micro_batches))]
        return [self.answer(model, batch, seed) for batch, seed in zip(micro_batches, seeds)]

    @torch.no_grad()
    def answer(self, model: VLM, batch: VLMBatch, seed: int) -> VLMBatch:
        """The batch with the student's own answers. Collective under FSDP2: ranks go on until the last is done."""
        was_training = model.training
        model.eval()
        device = batch.input_ids.device
        try:
            return regenerate(
                model,
                batch,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                generator=torch.Generator(device).manual_seed(seed),
                keep_going=lambda running: bool(sum_over_ranks(torch.tensor(float(running), device=device)) > 0),
            )
        finally:
            model.train(was_training)
