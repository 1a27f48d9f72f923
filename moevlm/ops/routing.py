"""From router logits to choices: which experts a token takes, and with which weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moevlm.batch import Routing


def top_k_routing(router_logits_TE: Tensor, *, top_k: int) -> Routing:
    """Choose the ``top_k`` experts of every token and mix them with weights that sum to 1.

    ``weights = probs[ids] / probs[ids].sum()`` (Mixtral, arXiv:2401.04088, Eq. 1). For ``top_k = 1`` that quotient is
    the constant 1, through which nothing could be learned, so the weight is ``p / p.detach()``: value 1, gradient of
    ``log p`` (ours). Hence for every k an upcycled layer equals the dense layer it was copied from. Switch
    Transformer's raw ``p`` (arXiv:2101.03961, Eq. 2) does not have this property.

    Args:
        router_logits_TE: any float dtype; softmax and weights are computed in float32.
        top_k: in [1, E].

    Returns:
        Routing without drops. ``router_probs`` and ``expert_weights`` carry gradient, ``expert_ids`` does not. Equal
        logits go to the lower expert number, so two calls on any device choose alike.

    Raises:
        ValueError: `top_k` lies outside [1, E].
    """
    num_experts = router_logits_TE.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in [1, num_experts={num_experts}], got {top_k}; set model.moe.top_k")
    router_logits_TE = router_logits_TE.float()
    router_probs_TE = torch.softmax(router_logits_TE, dim=-1)
    # torch.topk promises nothing about ties; a stable sort does
    expert_ids_TK = torch.sort(router_logits_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen_probs_TK = router_probs_TE.gather(1, expert_ids_TK)
    if top_k == 1:
        expert_weights_TK = chosen_probs_TK / chosen_probs_TK.detach()
    else:
        expert_weights_TK = chosen_probs_TK / chosen_probs_TK.sum(dim=-1, keepdim=True)
    return Routing(router_logits_TE, router_probs_TE, expert_ids_TK, expert_weights_TK)
