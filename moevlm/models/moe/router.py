"""The router: one linear map from a token to a logit per expert, in float32 throughout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """``router_logits = x @ weight.T``, without bias.

    Weights stay float32 and autocast is switched off inside: rounding the logits to bf16 changes choices (ST-MoE,
    arXiv:2202.08906, section 3.3; Switch Transformer's "selective precision", arXiv:2101.03961, section 2.4).
    """

    def __init__(self, width: int, num_experts: int, *, init_std: float = 0.02, seed: int = 0) -> None:
        """Draw the weights from N(0, init_std), on the CPU, so that a seed means the same weights on every device."""
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}; set model.moe.num_experts")
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(num_experts, width, generator=generator) * init_std)  # [E, D]
        self.random_generator: torch.Generator | None = None

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """[T, E] float32 logits."""
        with torch.autocast(device_type=hidden_TD.device.type, enabled=False):
            logits_TE = nn.functional.linear(hidden_TD.float(), self.weight.float())
        if self.random_generator is not None:
            noise_TE = torch.randn(logits_TE.shape, generator=self.random_generator)
            return noise_TE.to(logits_TE.device)
        return logits_TE


@contextmanager
def random_routing(model: nn.Module, *, seed: int = 0) -> Iterator[None]:
    """While open, every router of `model` ignores its token and draws logits from N(0, 1).

    What a model loses under it says how much its experts differ (ours); for evaluation only.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        raise ValueError("random routing needs a sparse model, this one has no router")
    for index, router in enumerate(routers):
        router.random_generator = torch.Generator().manual_seed(seed + 7919 * index)
    try:
        yield
    finally:
        for router in routers:
            router.random_generator = None
