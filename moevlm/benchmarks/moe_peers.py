"""MoE layers of other makers, given the same weights: what `moe_layer` measures beside ours.

Each function takes `Weights` and returns a `Layer`. Imports stand inside, so that a peer that is not installed says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot, silu, softmax

from moevlm.models.moe.experts import Projection, StackedExperts
from moevlm.models.moe.moe_layer import SparseMoE
from moevlm.models.moe.recorder import RoutingRecorder
from moevlm.models.moe.router import Router
from moevlm.models.moe.settings import MoESettings


@dataclass
class Weights:
    """Of one layer; contenders copy them, so that each has its own gradients."""

    router: Tensor  # [E, D]
    gate: Tensor  # [E, F, D]
    up: Tensor  # [E, F, D]
    down: Tensor  # [E, D, F]
    top_k: int

    @property
    def num_experts(self) -> int:
        return self.router.shape[0]

    def to(self, dtype: torch.dtype) -> Weights:
        """The same in another dtype."""
        router, gate, up, down = (tensor.to(dtype) for tensor in (self.router, self.gate, self.up, self.down))
        return Weights(router, gate, up, down, self.top_k)


@dataclass
class Layer:
    """A function of [T, D] and its parameters; `gradients` gives those of router, gate, up and down by these names."""

    forward: Callable[[Tensor], Tensor]
    parameters: Mapping[str, Tensor]
    gradients: Callable[[], Mapping[str, Tensor | None]]


def ours(weights: Weights, *, kernel: str) -> Layer:
    """This suite's layer, by fused kernels or plain operations."""
    settings = MoESettings(num_experts=weights.num_experts, top_k=weights.top_k, kernel=kernel)
    router = Router(weights.router.shape[1], weights.num_experts).to(weights.router.device)
    with torch.no_grad():
        router.weight.copy_(weights.router)
    parts = {"gate_proj": weights.gate, "up_proj": weights.up, "down_proj": weights.down}
    experts = StackedExperts([Projection(name, part.clone(), None) for name, part in parts.items()], nn.SiLU())
    layer = SparseMoE(router, experts, settings=settings, layer_index=0, recorder=RoutingRecorder())
    names = {"router": "router.weight", **{name.split("_")[0]: f"experts.{name}" for name in parts}}
    found = dict(layer.named_parameters())
    return Layer(layer, found, lambda: {name: found[key].grad for name, key in names.items()})


def dense(weights: Weights) -> Layer:
    """The floor: one dense SwiGLU network on the rows given, no routing at all; the weights of expert 0."""
    own = {name: _leaf(tensor[0]) for name, tensor in _expert_parts(weights).items()}

    def forward(rows_MD: Tensor) -> Tensor:
        return linear(silu(linear(rows_MD, own["gate"])) * linear(rows_MD, own["up"]), own["down"])

    return Layer(forward, own, lambda: {name: tensor.grad for name, tensor in own.items()})


def einsum_dispatch(weights: Weights, *, capacity: int) -> Layer:
    """One-hot dispatch and combine tensors [T, E, C], as GShard (arXiv:2006.16668, Alg. 1) and DeepSpeed 0.9.5 do.

    Every expert computes all of its C places, filled or not, and both einsums cost T * E * C * D.
    """
    own = {name: _leaf(tensor) for name, tensor in {"router": weights.router, **_expert_parts(weights)}.items()}
    num_experts, top_k = weights.num_experts, weights.top_k

    def forward(hidden_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = _mixtral_routing(hidden_TD, own["router"], top_k)
        chosen_TKE = one_hot(ids_TK, num_experts)
        queue_ME = chosen_TKE.transpose(0, 1).reshape(-1, num_experts)  # first choices first
        places_ME = (queue_ME.cumsum(0) - 1) * queue_ME
        places_TK = places_ME.sum(-1).view(top_k, -1).T
        kept_TK = places_TK < capacity
        combine_TEC = hidden_TD.new_zeros(len(hidden_TD), num_experts, capacity)
        for k in range(top_k):
            slot_TC = one_hot(places_TK[:, k].clamp_max(capacity - 1), capacity).to(hidden_TD.dtype)
            share_TE = chosen_TKE[:, k] * (weights_TK[:, k] * kept_TK[:, k]).unsqueeze(1)
            combine_TEC = combine_TEC + share_TE.to(hidden_TD.dtype).unsqueeze(2) * slot_TC.unsqueeze(1)
        dispatch_TEC = (combine_TEC != 0).to(hidden_TD.dtype)
        rows_ECD = torch.einsum("tec,td->ecd", dispatch_TEC, hidden_TD)
        inner_ECF = silu(torch.bmm(rows_ECD, own["gate"].mT)) * torch.bmm(rows_ECD, own["up"].mT)
        return torch.einsum("tec,ecd->td", combine_TEC, torch.bmm(inner_ECF, own["down"].mT))

    return Layer(forward, own, lambda: {name: tensor.grad for name, tensor in own.items()})


def transformers_experts(weights: Weights, *, implementation: str) -> Layer:
    """Mixtral's sparse block of transformers 5: "eager" loops over experts, "grouped_mm" and "batched_mm" do not."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    num_experts, inner, width = weights.gate.shape
    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_local_experts=num_experts,
        num_experts_per_tok=weights.top_k,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block = block.to_empty(device=weights.gate.device).to(weights.gate.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router)
        block.experts.gate_up_proj.copy_(torch.cat([weights.gate, weights.up], dim=1))
        block.experts.down_proj.copy_(weights.down)

    def forward(hidden_TD: Tensor) -> Tensor:
        return block(hidden_TD.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]

    def gradients() -> Mapping[str, Tensor | None]:
        return _split_gradients(block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)

    return Layer(forward, dict(block.named_parameters()), gradients)


def liger_experts(weights: Weights) -> Layer:
    """Liger's fused MoE kernels behind Mixtral's routing."""
    if not weights.gate.is_cuda:
        raise RuntimeError("Liger's kernels need a GPU")
    from liger_kernel.transformers.swiglu import LigerExperts

    num_experts, inner, width = weights.gate.shape
    config = SimpleNamespace(num_experts=num_experts, intermediate_size=inner, hidden_size=width, hidden_act="silu")
    with torch.device("meta"):
        experts = LigerExperts(config)
    experts = experts.to_empty(device=weights.gate.device).to(weights.gate.dtype)
    router = _leaf(weights.router)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat([weights.gate, weights.up], dim=1))
        experts.down_proj.copy_(weights.down)

    def forward(hidden_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = _mixtral_routing(hidden_TD, router, weights.top_k)
        return experts(hidden_TD, ids_TK, weights_TK)  # type: ignore[no-any-return]

    parameters = {"router": router, **dict(experts.named_parameters())}
    return Layer(forward, parameters, lambda: _split_gradients(router, experts.gate_up_proj, experts.down_proj))


def scatter_moe(weights: Weights) -> Layer:
    """ScatterMoE (arXiv:2403.08245), whose first map holds up above gate."""
    from scattermoe.mlp import GLUMLP

    num_experts, inner, width = weights.gate.shape
    experts = GLUMLP(
        input_size=width, hidden_size=inner, num_experts=num_experts, top_k=weights.top_k, activation=nn.SiLU()
    ).to(device=weights.gate.device, dtype=weights.gate.dtype)
    router = _leaf(weights.router)
    with torch.no_grad():
        experts.experts.weight.copy_(torch.cat([weights.up, weights.gate], dim=1))
        experts.output_experts.weight.copy_(weights.down)

    def forward(hidden_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = _mixtral_routing(hidden_TD, router, weights.top_k)
        return experts(hidden_TD, weights_TK, ids_TK)  # type: ignore[no-any-return]

    def gradients() -> Mapping[str, Tensor | None]:
        found = dict(_split_gradients(router, experts.experts.weight, experts.output_experts.weight))
        found["gate"], found["up"] = found["up"], found["gate"]
        return found

    return Layer(forward, {"router": router, **dict(experts.named_parameters())}, gradients)


def _mixtral_routing(hidden_TD: Tensor, router_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, K] in the dtype of the router's softmax, and choices."""
    probs_TE = softmax(linear(hidden_TD, router_ED).float(), dim=-1)
    weights_TK, ids_TK = torch.topk(probs_TE, top_k, dim=-1)
    return (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(hidden_TD.dtype), ids_TK


def _expert_parts(weights: Weights) -> dict[str, Tensor]:
    return {"gate": weights.gate, "up": weights.up, "down": weights.down}


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _split_gradients(router: Tensor, gate_up: Tensor, down: Tensor) -> dict[str, Tensor | None]:
    gate, up = (None, None) if gate_up.grad is None else gate_up.grad.chunk(2, dim=1)
    return {"router": router.grad, "gate": gate, "up": up, "down": down.grad}
