"""Expert capacity: an upper bound on the choices an expert accepts from one batch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from moevlm.batch import Routing


def expert_capacity(
    num_tokens: int, *, num_experts: int, top_k: int, capacity_factor: float, min_capacity: int = 0
) -> int:
    """Choices one expert accepts: ``max(ceil(T / E * capacity_factor * K), min_capacity)``, at most T.

    GShard (arXiv:2006.16668), section 2.2; DeepSpeed counts K into it as here. T are the real tokens given: padding
    has no part in it.
    """
    # rounding guards against 4 / 3 * 1.5 = 2.0000000000000004, whose ceil would be 3
    capacity = math.ceil(round(num_tokens * capacity_factor * top_k / num_experts, 6))
    return min(max(capacity, min_capacity), num_tokens)


def surviving_choices(expert_ids_TK: Tensor, *, num_experts: int, capacity: int) -> Tensor:
    """Which choices find a place: those whose position in their expert's queue is below `capacity`.

    Queues follow GShard (arXiv:2006.16668), Algorithm 1: all first choices in token order, then all second choices,
    and so on.

    Returns:
        [T, K] bool, no gradient.
    """
    num_tokens, top_k = expert_ids_TK.shape
    queue_M = expert_ids_TK.T.flatten()  # first choices first
    order_M = torch.argsort(queue_M, stable=True)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=queue_M.device)
    counts_E = counts_E.scatter_add_(0, queue_M, torch.ones_like(queue_M))
    starts_E = counts_E.cumsum(0) - counts_E
    places_M = torch.arange(queue_M.numel(), device=queue_M.device) - starts_E[queue_M[order_M]]
    kept_M = torch.empty_like(queue_M, dtype=torch.bool)
    kept_M[order_M] = places_M < capacity
    return kept_M.view(top_k, num_tokens).T.contiguous()


def drop_over_capacity(routing: Routing, *, capacity: int) -> Routing:
    """The routing in which choices beyond `capacity` count nothing and the survivors' weights sum to 1 again.

    A token that lost every choice has only zero weights: its layer output is 0 and the residual stream passes it on
    (Switch Transformer, arXiv:2101.03961, section 2.2). `expert_ids` keep the dropped choices, because balance losses
    and load are taken before dropping.
    """
    num_experts, top_k = routing.router_probs.shape[-1], routing.expert_ids.shape[-1]
    kept_TK = surviving_choices(routing.expert_ids, num_experts=num_experts, capacity=capacity)
    expert_weights_TK = routing.expert_weights * kept_TK
    if top_k > 1:  # a single choice has weight 1 already, and must keep the gradient of p / p.detach()
        total_T1 = expert_weights_TK.sum(dim=-1, keepdim=True)
        expert_weights_TK = expert_weights_TK / total_T1.clamp_min(torch.finfo(total_T1.dtype).tiny)
    return replace(routing, expert_weights=expert_weights_TK, dropped=~kept_TK)
