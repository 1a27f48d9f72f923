"""The experts of one layer as stacked parameters.

Stacked, [E, out, in], and not a list of modules: under FSDP2 a module that a rank skips corrupts the gradients of
others (pytorch#158719), and which experts a rank uses is decided by its tokens. A stacked parameter always gets a
gradient, zero for the experts that had no token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

GATED_FFNS = (("gate_proj", "up_proj", "down_proj"),)
FUSED_FFNS = (("gate_up_proj", "down_proj"),)  # one matrix whose upper half is the gate (Phi-3, GLM-4)
PLAIN_FFNS = (("fc1", "fc2"), ("up_proj", "down_proj"), ("dense_h_to_4h", "dense_4h_to_h"))
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")


class Projection(NamedTuple):
    """One linear map of a feed-forward network, or of E of them."""

    name: str
    weight: Tensor  # [out, in], or [E, out, in]
    bias: Tensor | None  # [out], or [E, out]


class StackedExperts(nn.Module):
    """E feed-forward networks of one shape.

    Gated: ``down(act(gate(x)) * up(x))`` (SwiGLU, arXiv:2002.05202); plain: ``second(act(first(x)))``. Parameters
    are named as in the dense network they come from: ``gate_proj`` [E, F, D], and ``gate_proj_bias`` [E, F] where it
    has biases. A fused ``gate_up_proj`` becomes ``gate_proj`` and ``up_proj``.
    """

    def __init__(self, projections: Sequence[Projection], activation: nn.Module) -> None:
        """Take over stacked weights.

        Args:
            projections: (name, weights [E, out, in], biases [E, out] or None), two for a plain network and three for a
                gated one.
            activation: shared by the experts; holds no parameter.
        """
        super().__init__()
        self.projection_names = tuple(name for name, _, _ in projections)
        for name, weight, bias in projections:
            self.register_parameter(name, nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", None if bias is None else nn.Parameter(bias))
        self.activation = activation

    @classmethod
    def from_dense(cls, ffn: nn.Module, *, num_experts: int) -> StackedExperts:
        """Copy a dense feed-forward network `num_experts` times (sparse upcycling, arXiv:2212.05055).

        Raises:
            ValueError: the network is of a kind that is not known here, or computes something else than its parts say.
        """
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}; set model.moe.num_experts")
        projections, activation = dense_parts(ffn)  # checks that the parts compute what the network computes
        return cls(stack([projections] * num_experts), activation).train(ffn.training)

    @property
    def num_experts(self) -> int:
        return self.get_parameter(self.projection_names[0]).shape[0]

    @property
    def num_own_parameters(self) -> int:
        """Parameters that belong to one expert alone."""
        return sum(parameter.numel() for parameter in self.parameters()) // self.num_experts

    def expert_weights(self) -> list[Tensor]:
        """What tells the experts apart: stacked tensors, [E, ...] each."""
        return list(self.parameters())

    def forward(self, rows_MD: Tensor, counts: Sequence[int]) -> Tensor:
        """Run expert e on its ``counts[e]`` consecutive rows; an expert without rows is skipped.

        unbind connects every expert to the graph at once: its backward writes one stacked gradient, where indexing
        expert by expert would add up E of them.
        """
        weights = [self.get_parameter(name).unbind(0) for name in self.projection_names]
        biases = [self._bias(name) for name in self.projection_names]
        outputs = []
        for expert, chunk_RD in enumerate(rows_MD.split(list(counts))):
            is_last_resort = expert == 0 and rows_MD.shape[0] == 0  # no row at all: keep the graph connected
            if counts[expert] or is_last_resort:
                projections = [(weight[expert], bias[expert]) for weight, bias in zip(weights, biases)]
                outputs.append(self._run(chunk_RD, projections))
        return torch.cat(outputs)

    @property
    def is_swiglu(self) -> bool:
        """Whether the experts compute ``down(silu(gate(x)) * up(x))`` without biases."""
        gated = self.projection_names == GATED_FFNS[0] and is_silu(self.activation)
        return gated and all(getattr(self, f"{name}_bias") is None for name in self.projection_names)

    def run_one(self, expert: int, rows_RD: Tensor) -> Tensor:
        """One expert on all rows."""
        names = self.projection_names
        return self._run(rows_RD, [(self.get_parameter(name)[expert], self._bias(name)[expert]) for name in names])

    def _bias(self, name: str) -> Sequence[Tensor | None]:
        bias: Tensor | None = getattr(self, f"{name}_bias")
        return [None] * self.num_experts if bias is None else bias.unbind(0)

    def _run(self, rows_RD: Tensor, projections: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        linear = nn.functional.linear
        if len(projections) == 3:
            gate, up, down = projections
            return linear(self.activation(linear(rows_RD, *gate)) * linear(rows_RD, *up), *down)
        first, second = projections
        return linear(self.activation(linear(rows_RD, *first)), *second)


def is_silu(activation: nn.Module) -> bool:
    """Whether an activation is ``x * sigmoid(x)``; transformers has a class of its own for it."""
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def dense_parts(ffn: nn.Module) -> tuple[list[Projection], nn.Module]:
    """What a dense feed-forward network is made of: its projections, detached, and a copy of its activation.

    Raises:
        ValueError: the network is of a kind that is not known here, or computes something else than its parts say.
    """
    projections = [
        Projection(name, weight.detach(), None if bias is None else bias.detach())
        for name, weight, bias in ffn_projections(ffn)
    ]
    activation = copy.deepcopy(_activation(ffn))
    _check_equal(ffn, StackedExperts(stack([projections]), activation).train(ffn.training))
    return projections, activation


def stack(networks: Sequence[Sequence[Projection]]) -> list[Projection]:
    """Networks of one shape as stacked projections, [E, out, in] and [E, out]; new memory, nothing is shared."""
    stacked = []
    for parts in zip(*networks):
        biases = [part.bias for part in parts if part.bias is not None]
        assert len(biases) in (0, len(parts)), "all experts have a bias or none"
        weight = torch.stack([part.weight for part in parts])
        stacked.append(Projection(parts[0].name, weight, torch.stack(biases) if biases else None))
    return stacked


def ffn_projections(ffn: nn.Module) -> list[Projection]:
    """Name, weight and bias of each linear map of a feed-forward network, in order of use: two, or three if gated.

    Raises:
        ValueError: its linear layers have other names than the known kinds.
    """
    linears = {name: child for name, child in ffn.named_children() if isinstance(child, nn.Linear)}
    for names in (*GATED_FFNS, *PLAIN_FFNS, *FUSED_FFNS):
        if linears.keys() == set(names):
            projections = [Projection(name, linears[name].weight, linears[name].bias) for name in names]
            return _split_fused(projections) if names in FUSED_FFNS else projections
    known = ", ".join("/".join(names) for names in (*GATED_FFNS, *PLAIN_FFNS, *FUSED_FFNS))
    found = "/".join(name for name, _ in ffn.named_children()) or "no submodule"
    raise ValueError(
        f"{type(ffn).__name__} with {found} cannot be turned into experts; known feed-forward networks: {known}; "
        "set model.language_model to a decoder that has one of these"
    )


def _split_fused(projections: list[Projection]) -> list[Projection]:
    (_, weight, bias), down = projections
    gate, up = weight.chunk(2)
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
    return [Projection("gate_proj", gate, gate_bias), Projection("up_proj", up, up_bias), down]


def _activation(ffn: nn.Module) -> nn.Module:
    for name in ACTIVATION_NAMES:
        if isinstance(getattr(ffn, name, None), nn.Module):
            return getattr(ffn, name)  # type: ignore[no-any-return]
    raise ValueError(f"{type(ffn).__name__} has no activation module named {', '.join(ACTIVATION_NAMES)}")


@torch.no_grad()
def _check_equal(ffn: nn.Module, experts: StackedExperts) -> None:
    """A network with a hidden factor or dropout would pass the check by names; compare results."""
    weight_EFD = experts.get_parameter(experts.projection_names[0])
    if weight_EFD.is_meta:
        return
    rows_MD = torch.linspace(-1, 1, 3 * weight_EFD.shape[-1], device=weight_EFD.device, dtype=weight_EFD.dtype)
    rows_MD = rows_MD.sin().view(3, -1)
    expected_MD, found_MD = ffn(rows_MD), experts(rows_MD, [3] + [0] * (experts.num_experts - 1))
    # a model that is about to be loaded holds whatever its memory held, NaN included
    if not torch.allclose(expected_MD, found_MD, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"{type(ffn).__name__} computes something else than its linear layers say; it cannot be upcycled"
        )
