"""Sparse upcycling: copy the feed-forward networks of a trained dense model into experts and add routers."""

from __future__ import annotations

from collections.abc import Sequence

from moevlm.models.decoder import decoder_layers
from moevlm.models.moe.experts import StackedExperts
from moevlm.models.moe.moe_layer import SparseMoE
from moevlm.models.moe.router import Router
from moevlm.models.vlm import VLM

PLACEMENTS = ("first_half", "second_half", "interval", "all")


def moe_layer_indices(num_layers: int, placement: str | Sequence[int]) -> list[int]:
    """The decoder layers that become sparse, counted from 0 (MoE-LLaVA, arXiv:2401.15947, Table 7c).

    Args:
        num_layers: decoder layers.
        placement: first_half, second_half, interval (0, 2, 4, ...), all, or the layers themselves.

    Raises:
        ValueError: unknown placement, a layer that is not there or named twice, or no layer at all.
    """
    if isinstance(placement, str):
        choices = {
            "first_half": range(num_layers // 2),
            "second_half": range(num_layers // 2, num_layers),
            "interval": range(0, num_layers, 2),
            "all": range(num_layers),
        }
        if placement not in choices:
            raise ValueError(
                f"unknown placement {placement!r}; known: {', '.join(choices)}, or a list of layers; "
                "set model.moe.placement"
            )
        indices = list(choices[placement])
    else:
        indices = sorted(placement)
    if len(set(indices)) != len(indices) or not all(0 <= index < num_layers for index in indices) or not indices:
        raise ValueError(
            f"MoE layers must be different and lie in [0, {num_layers - 1}], at least one, got {list(placement)}; "
            "set model.moe.placement"
        )
    return indices


def upcycle(
    vlm: VLM,
    *,
    num_experts: int | Sequence[int],
    top_k: int = 2,
    placement: str | Sequence[int] = "interval",
    capacity_factor: float | None = None,
    min_capacity: int = 0,
    router_init_std: float = 0.02,
    seed: int = 0,
) -> VLM:
    """Make chosen layers of a dense model sparse, in place (arXiv:2212.05055, section 3).

    Every expert starts as a copy of the layer's feed-forward network, so for any `top_k` the model computes what it
    computed before; only the routers are new, drawn by `seed` and layer.

    Args:
        num_experts: one number for all MoE layers, or one per MoE layer.
        top_k: experts per token.
        placement: see `moe_layer_indices`.
        capacity_factor: see `SparseMoE`; None drops nothing.
        router_init_std: standard deviation of the routers' weights.

    Returns:
        The same object.

    Raises:
        ValueError: settings that do not fit the model, a model that is sparse already, unknown feed-forward networks.
    """
    if vlm.moe_layers:
        raise ValueError(f"the model is sparse already, in layers {list(vlm.moe_layers)}; set model.moe=null")
    layers = decoder_layers(vlm.language_model)
    indices = moe_layer_indices(len(layers), placement)
    per_layer = [num_experts] * len(indices) if isinstance(num_experts, int) else list(num_experts)
    if len(per_layer) != len(indices):
        raise ValueError(
            f"num_experts lists {len(per_layer)} layers, placement {placement!r} has {len(indices)}; "
            "set model.moe.num_experts to one number or one per MoE layer"
        )
    sparse = {}
    for index, count in zip(indices, per_layer):
        dense = getattr(layers[index], "mlp", None)
        if dense is None:
            raise ValueError(f"{type(layers[index]).__name__} has no mlp; set model.language_model to another decoder")
        experts = StackedExperts.from_dense(dense, num_experts=count)
        weight = experts.get_parameter(experts.projection_names[0])
        router = Router(weight.shape[-1], count, init_std=router_init_std, seed=seed * 1_000_003 + index)
        sparse[index] = SparseMoE(
            router.to(weight.device),
            experts,
            top_k=top_k,
            layer_index=index,
            recorder=vlm.recorder,
            capacity_factor=capacity_factor,
            min_capacity=min_capacity,
        ).train(dense.training)
    for index, layer in sparse.items():  # only once nothing can fail any more
        layers[index].mlp = layer
    return vlm
