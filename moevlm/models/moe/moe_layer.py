"""The sparse feed-forward layer that takes the place of a decoder layer's ``mlp``."""

from __future__ import annotations

from torch import Tensor, nn

from moevlm.models.moe.experts import StackedExperts
from moevlm.models.moe.recorder import RoutingRecorder
from moevlm.models.moe.router import Router
from moevlm.ops.capacity import drop_over_capacity, expert_capacity
from moevlm.ops.dispatch import combine, dispatch_by_expert, permute
from moevlm.ops.routing import top_k_routing


class SparseMoE(nn.Module):
    """``y_t = sum over the top_k experts e of weight_te * expert_e(x_t)`` (arXiv:1701.06538, Eq. 1).

    Dropless unless `capacity_factor` is set. A capacity holds in training only: it makes a token's output depend on the
    rest of its batch, which evaluation must not do (deviation from DeepSpeed, which has an eval_capacity_factor).
    """

    def __init__(
        self,
        router: Router,
        experts: StackedExperts,
        *,
        top_k: int,
        layer_index: int,
        recorder: RoutingRecorder,
        capacity_factor: float | None = None,
        min_capacity: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts.num_experts:
            raise ValueError(
                f"top_k must lie in [1, num_experts={experts.num_experts}], got {top_k}; set model.moe.top_k"
            )
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(
                f"capacity_factor must be positive, or null for no limit, got {capacity_factor}; "
                "set model.moe.capacity_factor"
            )
        if min_capacity < 0 or (min_capacity > 0 and capacity_factor is None):
            raise ValueError(
                f"min_capacity={min_capacity} needs a capacity_factor and must not be negative; "
                "set model.moe.capacity_factor or model.moe.min_capacity=0"
            )
        self.router = router
        self.experts = experts
        self.top_k = top_k
        self.layer_index = layer_index
        self.recorder = recorder
        self.capacity_factor = capacity_factor
        self.min_capacity = min_capacity

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]; rows that the recorder's token mask calls padding are skipped and come out as 0."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        token_mask = self.recorder.token_mask
        if token_mask is None:
            return self._route(hidden_TD).view_as(hidden_states)
        token_mask_T = token_mask.reshape(-1)
        output_TD = hidden_TD.new_zeros(hidden_TD.shape)
        output_TD[token_mask_T] = self._route(hidden_TD[token_mask_T]).to(output_TD.dtype)
        return output_TD.view_as(hidden_states)

    def _route(self, hidden_TD: Tensor) -> Tensor:
        routing = top_k_routing(self.router(hidden_TD), top_k=self.top_k)
        if self.capacity_factor is not None and self.training:
            capacity = expert_capacity(
                hidden_TD.shape[0],
                num_experts=self.num_experts,
                top_k=self.top_k,
                capacity_factor=self.capacity_factor,
                min_capacity=self.min_capacity,
            )
            routing = drop_over_capacity(routing, capacity=capacity)
        self.recorder.record(self.layer_index, routing)
        dispatch = dispatch_by_expert(routing.expert_ids, num_experts=self.num_experts, dropped_TK=routing.dropped)
        rows_MD = self.experts(permute(hidden_TD, dispatch, top_k=self.top_k), dispatch.counts)
        return combine(rows_MD, dispatch, routing.expert_weights)
