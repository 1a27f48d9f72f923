"""Hand-made model outputs and heads, and the slow versions of the losses in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from moevlm.batch import IGNORE_INDEX, Head, VLMOutput


def make_head(
    num_tokens: int, width: int, *, bias: bool = False, softcap: float | None = None, scale: float = 1.0, seed: int = 0
) -> Head:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_tokens, width, generator=generator).requires_grad_()
    bias_V = torch.randn(num_tokens, generator=generator).requires_grad_() if bias else None
    return Head(weight, bias_V, softcap, scale)


def make_output(hidden_UD: Tensor, lengths: tuple[int, ...]) -> VLMOutput:
    """An output whose spliced coordinates are its text coordinates (no image)."""
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.arange(sum(lengths))
    return VLMOutput(hidden_UD, positions, torch.zeros_like(positions), sequences, lengths)


def make_labels(lengths: tuple[int, ...], num_tokens: int, *, every: int = 2, seed: int = 0) -> Tensor:
    """Random labels on every `every`-th token, never on the first of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_tokens, (sum(lengths),), generator=generator)
    places = torch.cat([torch.arange(length) for length in lengths])
    return torch.where(places % every == every - 1, labels, IGNORE_INDEX)


def double(head: Head) -> tuple[Tensor, Tensor | None]:
    weight = head.weight.detach().double().requires_grad_()
    return weight, None if head.bias is None else head.bias.detach().double().requires_grad_()


def double_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    logits = hidden @ weight.T * head.scale
    if bias is not None:
        logits = (hidden @ weight.T + bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
