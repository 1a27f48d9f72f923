"""Experts that share one frozen network and own a low-rank delta each: the cheap way to many experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moevlm.models.moe.experts import Projection, StackedExperts


class LoRAExperts(nn.Module):
    """E feed-forward networks whose every map is ``W x + b + alpha / r * B_e A_e x`` (LoRA, arXiv:2106.09685, Eq. 3).

    W and b are one dense network's, shared and frozen; A_e [r, in] and B_e [out, r] are expert e's own (mixtures of
    such deltas: arXiv:2309.05444). B starts at zero, so every expert starts as the dense network. The shared maps run
    once over all rows, whoever the expert is.
    """

    def __init__(
        self,
        projections: Sequence[Projection],
        activation: nn.Module,
        *,
        num_experts: int,
        rank: int,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Take over a dense network's weights and draw A.

        Args:
            projections: of the dense network: two for a plain one, three for a gated one.
            activation: holds no parameter.
            rank: r of every delta.
            alpha: numerator of the deltas' scale; None is twice the rank.
            generator: draws A from U(-1/sqrt(in), 1/sqrt(in)), peft's default; on the CPU.
        """
        super().__init__()
        self.projection_names = tuple(part.name for part in projections)
        self.num_experts, self.rank = num_experts, rank
        self.scale = (2 * rank if alpha is None else alpha) / rank
        for name, weight, bias in projections:
            self.register_parameter(f"base_{name}", nn.Parameter(weight.clone(), requires_grad=False))
            frozen_bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
            self.register_parameter(f"base_{name}_bias", frozen_bias)
            width_out, width_in = weight.shape
            drawn_ERI = torch.rand(num_experts, rank, width_in, generator=generator, device="cpu") * 2 - 1
            down_ERI = (drawn_ERI / math.sqrt(width_in)).to(device=weight.device, dtype=weight.dtype)
            self.register_parameter(f"{name}_lora_A", nn.Parameter(down_ERI))
            self.register_parameter(f"{name}_lora_B", nn.Parameter(weight.new_zeros(num_experts, width_out, rank)))
        self.activation = activation

    def forward(self, rows_MD: Tensor, counts: Sequence[int]) -> Tensor:
        """Run expert e on its ``counts[e]`` consecutive rows."""
        if len(self.projection_names) == 3:
            gate, up, down = self.projection_names
            hidden_MF = self.activation(self._map(gate, rows_MD, counts)) * self._map(up, rows_MD, counts)
            return self._map(down, hidden_MF, counts)
        first, second = self.projection_names
        return self._map(second, self.activation(self._map(first, rows_MD, counts)), counts)

    def merged(self) -> StackedExperts:
        """The same experts as whole networks, ``W + alpha / r * B_e A_e``; what exports need."""
        projections = []
        for name in self.projection_names:
            weight, bias = self._base(name)
            down_ERI, up_EOR = self.get_parameter(f"{name}_lora_A"), self.get_parameter(f"{name}_lora_B")
            delta_EOI = torch.bmm(up_EOR.detach().float(), down_ERI.detach().float()) * self.scale
            bias_EO = None if bias is None else bias.detach().repeat(self.num_experts, 1)
            projections.append(Projection(name, (weight.detach().float() + delta_EOI).to(weight.dtype), bias_EO))
        return StackedExperts(projections, self.activation).train(self.training)

    @property
    def num_own_parameters(self) -> int:
        """Parameters that belong to one expert alone: its deltas."""
        deltas = [parameter.numel() for name, parameter in self.named_parameters() if "_lora_" in name]
        return sum(deltas) // self.num_experts

    def expert_weights(self) -> list[Tensor]:
        """What tells the experts apart: the merged weights, [E, ...] each."""
        return list(self.merged().parameters())

    def _base(self, name: str) -> tuple[Tensor, Tensor | None]:
        bias: Tensor | None = getattr(self, f"base_{name}_bias")
        return self.get_parameter(f"base_{name}"), bias

    def _map(self, name: str, rows_MI: Tensor, counts: Sequence[int]) -> Tensor:
        linear = nn.functional.linear
        down = self.get_parameter(f"{name}_lora_A").unbind(0)  # as in StackedExperts: one stacked gradient
        up = self.get_parameter(f"{name}_lora_B").unbind(0)
        deltas = [
            linear(linear(chunk_RI, down[expert]), up[expert])
            for expert, chunk_RI in enumerate(rows_MI.split(list(counts)))
            if counts[expert] or (expert == 0 and rows_MI.shape[0] == 0)
        ]
        return linear(rows_MI, *self._base(name)) + self.scale * torch.cat(deltas)


Experts = StackedExperts | LoRAExperts
