"""The sparse feed-forward layer that takes the place of a decoder layer's ``mlp``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moevlm.batch import Routing
from moevlm.models.moe.experts import StackedExperts
from moevlm.models.moe.lora_experts import Experts
from moevlm.models.moe.recorder import RoutingRecorder
from moevlm.models.moe.router import Router
from moevlm.models.moe.settings import MoESettings
from moevlm.ops.capacity import expert_capacity
from moevlm.ops.decode import Choices, gated_ffn, has_kernels
from moevlm.ops.deepspeed import deepspeed_routing
from moevlm.ops.dispatch import combine, dispatch_by_expert, permute
from moevlm.ops.fused_choosing import fused_top_k_routing
from moevlm.ops.routed_ffn import MOST_EXPERTS, SwiGLUExperts, routed_swiglu
from moevlm.ops.routing import top_k_routing


class SparseMoE(nn.Module):
    """``y_t = sum over the top_k experts e of weight_te * expert_e(x_t)`` (arXiv:1701.06538, Eq. 1).

    With a shared expert (DeepSeekMoE, arXiv:2401.06066, Eq. 9) its output is added. As a residual layer (DeepSpeed-MoE,
    arXiv:2201.05596, section 4.1; DeepSpeed's mixing) the output is ``c_0 * y + c_1 * residual_expert(x)`` with
    ``c = softmax(coefficient(x))``. Whatever is random (jitter, random drops, a sampled second choice) is so in
    training only.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        settings: MoESettings,
        layer_index: int,
        recorder: RoutingRecorder,
        shared_expert: StackedExperts | None = None,
        residual_expert: StackedExperts | None = None,
        coefficient: nn.Linear | None = None,
    ) -> None:
        """Join the parts; `settings` say how tokens are routed. A residual expert needs its `coefficient` [D -> 2].

        Raises:
            ValueError: fused kernels are asked for, and the experts are not what they compute.
        """
        super().__init__()
        assert (residual_expert is None) == (coefficient is None)
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self.residual_expert = residual_expert
        self.coefficient = coefficient
        self.settings = settings
        self.layer_index = layer_index
        self.recorder = recorder
        self.use_kernel(settings.kernel)

    def use_kernel(self, kernel: str) -> None:
        """Choose between fused kernels and plain PyTorch; ``auto`` takes kernels wherever they fit.

        Raises:
            ValueError: fused kernels are asked for, and the experts are not what they compute.
        """
        experts = self.experts
        fits = isinstance(experts, StackedExperts) and experts.is_swiglu and experts.num_experts <= MOST_EXPERTS
        if kernel == "fused" and not fits:
            raise ValueError(
                f"kernel fused computes up to {MOST_EXPERTS} SwiGLU experts without biases, got {experts.num_experts} "
                f"{type(experts).__name__} of {'/'.join(experts.projection_names)} with "
                f"{type(experts.activation).__name__}; set model.moe.kernel=auto"
            )
        self.settings = dataclasses.replace(self.settings, kernel=kernel)
        self.can_fuse = fits and kernel != "plain"

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def top_k(self) -> int:
        return self.settings.top_k

    @property
    def num_idle_parameters(self) -> int:
        """Parameters that a token does not meet: those of the routed experts it is not sent to."""
        return (self.num_experts - self.top_k) * self.experts.num_own_parameters

    # Shapes follow the routing, kernels are called as they are: a compiled decoder layer is cut here. (Under the public
    # name, torch.compiler.disable, importing this file would take seconds.)
    @torch._disable_dynamo
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]; rows that the recorder's token mask calls padding are skipped and come out as 0."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        # in a static step a row that no longer runs comes out as its shared part; nobody reads it
        if self.recorder.is_static or (rows_N := self.recorder.token_rows) is None:
            return self._mix(hidden_TD).view_as(hidden_states)
        mixed_ND = self._mix(hidden_TD.index_select(0, rows_N)).to(hidden_TD.dtype)
        return torch.zeros_like(hidden_TD).index_copy(0, rows_N, mixed_ND).view_as(hidden_states)

    def _mix(self, hidden_TD: Tensor) -> Tensor:
        """Routed experts, and what every token sees beside them."""
        routed_TD = self._route(hidden_TD)
        if self.shared_expert is not None:
            return routed_TD + self.shared_expert(hidden_TD, [hidden_TD.shape[0]])
        if self.residual_expert is not None and self.coefficient is not None:
            dense_TD = self.residual_expert(hidden_TD, [hidden_TD.shape[0]])
            shares_T2 = self.coefficient(hidden_TD).float().softmax(dim=-1).to(routed_TD.dtype)
            return shares_T2[:, :1] * routed_TD + shares_T2[:, 1:] * dense_TD
        return routed_TD

    def _route(self, hidden_TD: Tensor) -> Tensor:
        if self.recorder.is_static:
            return self._route_few(hidden_TD, self._choose(self.router(hidden_TD)))
        if self.can_fuse and (self.settings.kernel == "fused" or has_kernels(hidden_TD.device)):
            return self._route_fused(hidden_TD)
        routing = self._choose(self.router(hidden_TD))
        self.recorder.record(self.layer_index, routing)
        dispatch = dispatch_by_expert(routing.expert_ids, num_experts=self.num_experts, dropped_TK=routing.dropped)
        rows_MD = self.experts(permute(hidden_TD, dispatch, top_k=self.top_k), dispatch.counts)
        return combine(rows_MD, dispatch, routing.expert_weights * self.settings.weight_scale)

    @property
    def can_be_static(self) -> bool:
        """Whether a decode step through this layer can be captured: no drops, no randomness, experts of their own."""
        drops_nothing = self.settings.policy == "dropless" and self.router.random_generator is None
        return drops_nothing and isinstance(self.experts, StackedExperts)

    def _route_few(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """`_route` for few tokens, without a question to the device; tokens that no longer run choose nothing."""
        assert isinstance(self.experts, StackedExperts), "see can_be_static"
        ids_TK, mask = routing.expert_ids.int(), self.recorder.token_mask
        if mask is not None:
            ids_TK = ids_TK.masked_fill(~mask.reshape(-1, 1), -1)
        choices = Choices(ids_TK, routing.expert_weights * self.settings.weight_scale)
        if self.experts.is_swiglu:
            gate_EFD, up_EFD, down_EDF = self.experts.parameters()
            is_plain = self.settings.kernel == "plain"
            return gated_ffn(hidden_TD, gate_EFD, up_EFD, down_EDF, choices, plain=is_plain)
        mixed_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        for expert in range(self.num_experts):
            share_T1 = (choices.weights * (ids_TK == expert)).sum(dim=1, keepdim=True)
            mixed_TD += self.experts.run_one(expert, hidden_TD).float() * share_T1
        return mixed_TD.to(hidden_TD.dtype)

    def _route_fused(self, hidden_TD: Tensor) -> Tensor:
        device_type, scale, dtype = hidden_TD.device.type, self.settings.weight_scale, hidden_TD.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        logits_TE, hidden_TD = self.router(hidden_TD, tokens_dtype=dtype)
        routing = self._choose(logits_TE, fused_top_k_routing)
        self.recorder.record(self.layer_index, routing)
        weights_TK = routing.expert_weights if scale == 1.0 else routing.expert_weights * scale
        experts = SwiGLUExperts(*(self.experts.get_parameter(name).to(dtype) for name in self.experts.projection_names))
        with torch.autocast(device_type, enabled=False):
            return routed_swiglu(hidden_TD, routing.expert_ids, weights_TK, experts, dropped_TK=routing.dropped)

    def _choose(self, router_logits_TE: Tensor, choose: Callable[..., Routing] = top_k_routing) -> Routing:
        settings, bias_E = self.settings, self.router.selection_bias
        if settings.policy == "dropless":
            return choose(
                router_logits_TE,
                top_k=self.top_k,
                score=settings.score,
                normalise=settings.normalises,
                selection_bias_E=bias_E,
            )
        factor = settings.capacity_factor if self.training else settings.eval_capacity_factor
        drops_at_random = settings.drop_order == "random"
        return deepspeed_routing(
            router_logits_TE,
            top_k=self.top_k,
            capacity=None if factor is None else self._capacity(router_logits_TE.shape[0], factor),
            normalise=settings.normalises,
            drop_order="position" if drops_at_random and not self.training else settings.drop_order,
            score=settings.score,
            selection_bias_E=bias_E,
            sample_second_choice=settings.sample_second_choice and self.training,
        )

    def _capacity(self, num_tokens: int, factor: float) -> int:
        return expert_capacity(
            num_tokens,
            num_experts=self.num_experts,
            top_k=self.top_k,
            capacity_factor=factor,
            min_capacity=self.settings.min_capacity,
        )
