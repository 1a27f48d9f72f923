"""The router: one linear map from a token to a logit per expert, in float32 throughout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moevlm.ops.fused_router import router_logits


class Router(nn.Module):
    """``router_logits = x @ weight.T``, without bias.

    Weights stay float32 and autocast is switched off inside: rounding the logits to bf16 changes choices (ST-MoE,
    arXiv:2202.08906, section 3.3; Switch Transformer's "selective precision", arXiv:2101.03961, section 2.4).
    """

    selection_bias: Tensor | None  # [E] float32, added to the scores for the choice alone

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        init_std: float | None = 0.02,
        seed: int = 0,
        group_size: int = 1,
        jitter: float = 0.0,
        bias_update_rate: float = 0.0,
    ) -> None:
        """Draw the weights on the CPU, so that a seed means the same weights on every device.

        Args:
            init_std: weights come from N(0, init_std); None: from U(-1/sqrt(D), 1/sqrt(D)), as nn.Linear's.
            group_size: consecutive experts that start with one row, hence are chosen together (virtual groups,
                arXiv:2410.07524, section 3.2).
            jitter: in training the input is multiplied by U(1 - jitter, 1 + jitter), element by element (Switch
                Transformer, arXiv:2101.03961, section 2.4).
            bias_update_rate: u of loss-free balancing; above 0 the router has a `selection_bias`.
        """
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}; set model.moe.num_experts")
        assert num_experts % group_size == 0
        generator = torch.Generator().manual_seed(seed)
        shape = (num_experts // group_size, width)
        if init_std is None:
            rows = (torch.rand(shape, generator=generator, device="cpu") * 2 - 1) / math.sqrt(width)
        else:
            rows = torch.randn(shape, generator=generator, device="cpu") * init_std
        self.weight = nn.Parameter(rows.repeat_interleave(group_size, dim=0))  # [E, D]
        self.jitter, self.bias_update_rate = jitter, bias_update_rate
        self.register_buffer("selection_bias", torch.zeros(num_experts) if bias_update_rate > 0 else None)
        self.random_generator: torch.Generator | None = None

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def forward(self, hidden_TD: Tensor, *, tokens_dtype: torch.dtype | None = None) -> Any:
        """[T, E] float32 logits; with a dtype also the tokens for the experts in it, see `moevlm.ops.fused_router`."""
        is_exact = self.random_generator is None and not (self.jitter > 0 and self.training)
        if tokens_dtype is not None and is_exact:
            with torch.autocast(device_type=hidden_TD.device.type, enabled=False):
                return router_logits(hidden_TD, self.weight.float(), dtype=tokens_dtype)
        logits_TE = self._logits(hidden_TD)
        return logits_TE if tokens_dtype is None else (logits_TE, hidden_TD.to(tokens_dtype))

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        hidden_TD = hidden_TD.float()
        if self.jitter > 0 and self.training:
            hidden_TD = hidden_TD * torch.empty_like(hidden_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        with torch.autocast(device_type=hidden_TD.device.type, enabled=False):
            logits_TE = nn.functional.linear(hidden_TD, self.weight.float())
        if self.random_generator is not None:
            noise_TE = torch.randn(logits_TE.shape, generator=self.random_generator, device="cpu")
            return noise_TE.to(logits_TE.device)
        return logits_TE

    @torch.no_grad()
    def update_selection_bias(self, counts_E: Tensor) -> None:
        """Loss-free balancing (arXiv:2408.15664, Alg. 1): ``b_e += u * sign(mean count - count_e)``.

        Args:
            counts_E: how often each expert was chosen in the whole optimizer step, over micro-batches and ranks.
        """
        assert self.selection_bias is not None
        counts_E = counts_E.to(self.selection_bias)
        self.selection_bias += self.bias_update_rate * torch.sign(counts_E.mean() - counts_E)


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
