"""Sparse upcycling: copy the feed-forward networks of a trained dense model into experts and add routers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moevlm.models.decoder import decoder_layers
from moevlm.models.moe.experts import StackedExperts, dense_parts, stack
from moevlm.models.moe.initialisation import routed_experts, split_shared
from moevlm.models.moe.lora_experts import Experts, LoRAExperts
from moevlm.models.moe.moe_layer import SparseMoE
from moevlm.models.moe.recorder import RoutingRecorder
from moevlm.models.moe.router import Router
from moevlm.models.moe.settings import MoESettings
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


def upcycle(vlm: VLM, **settings: Any) -> VLM:
    """Make chosen layers of a dense model sparse, in place (sparse upcycling, arXiv:2212.05055, section 3).

    By default every expert starts as a copy of the layer's feed-forward network, so for any `top_k` the model computes
    what it computed before; only the routers are new, drawn by `seed` and layer.

    Args:
        settings: keys of `MoESettings`, for example ``num_experts=4, top_k=2, placement="interval"``.

    Returns:
        The same object.

    Raises:
        ValueError: settings that do not fit the model or each other, a model that is sparse already, unknown
            feed-forward networks.
    """
    return make_sparse(vlm, MoESettings.from_dict(settings))


def make_sparse(vlm: VLM, settings: MoESettings, *, initialise: bool = True) -> VLM:
    """What `upcycle` does; ``initialise=False`` gives the right shapes and any weights, for a model to be loaded."""
    if vlm.moe_layers:
        raise ValueError(f"the model is sparse already, in layers {list(vlm.moe_layers)}; set model.moe=null")
    layers = decoder_layers(vlm.language_model)
    settings = resolved(settings, len(layers))
    assert not isinstance(settings.num_experts, int)
    sparse = {}
    for index, num_experts in zip(settings.placement, settings.num_experts):
        assert isinstance(index, int)
        dense = getattr(layers[index], "mlp", None)
        if dense is None:
            raise ValueError(f"{type(layers[index]).__name__} has no mlp; set model.language_model to another decoder")
        sparse[index] = sparse_layer(dense, num_experts, settings, index, vlm.recorder, initialise=initialise)
    for index, layer in sparse.items():  # only once nothing can fail any more
        layers[index].mlp = layer
    return vlm


def resolved(settings: MoESettings, num_layers: int) -> MoESettings:
    """The settings with layers and expert counts written out, as a decoder of `num_layers` gives them meaning.

    Raises:
        ValueError: layers outside the model, or another number of expert counts than of layers.
    """
    indices = moe_layer_indices(num_layers, settings.placement)
    per_layer = settings.num_experts
    per_layer = [per_layer] * len(indices) if isinstance(per_layer, int) else list(per_layer)
    if len(per_layer) != len(indices):
        raise ValueError(
            f"num_experts lists {len(per_layer)} layers, placement {settings.placement!r} has {len(indices)}; "
            "set model.moe.num_experts to one number or one per MoE layer"
        )
    return dataclasses.replace(settings, num_experts=per_layer, placement=indices)


def sparse_layer(
    dense: nn.Module,
    num_experts: int,
    settings: MoESettings,
    index: int,
    recorder: RoutingRecorder,
    *,
    initialise: bool,
) -> SparseMoE:
    """The MoE layer that takes the place of `dense`; the same seed and layer draw the same weights."""
    network, activation = dense_parts(dense)
    width, device = network[0].weight.shape[-1], network[0].weight.device
    seed = settings.seed * 1_000_003 + index
    generator = torch.Generator().manual_seed(seed + 500_000_003)  # not the router's
    shared, routed = split_shared(network, settings)
    router = Router(
        width,
        num_experts,
        init_std=settings.router_init_std,
        seed=seed,
        group_size=settings.granularity,
        jitter=settings.jitter,
        bias_update_rate=settings.bias_update_rate,
    )
    experts: Experts
    if settings.experts == "lora":
        assert settings.lora_rank is not None
        rank, alpha = settings.lora_rank, settings.lora_alpha
        experts = LoRAExperts(routed, activation, num_experts=num_experts, rank=rank, alpha=alpha, generator=generator)
    else:
        weights = routed_experts(routed, num_experts, settings, generator, initialise=initialise)
        experts = StackedExperts(weights, activation)
    layer = SparseMoE(
        router.to(device),
        experts,
        settings=settings,
        layer_index=index,
        recorder=recorder,
        shared_expert=None if shared is None else StackedExperts(stack([shared]), activation),
        residual_expert=StackedExperts(stack([network]), activation) if settings.residual else None,
        coefficient=_coefficient(network[0].weight, generator) if settings.residual else None,
    )
    return layer.train(dense.training)


def _coefficient(like: Tensor, generator: torch.Generator) -> nn.Linear:
    """[D -> 2], drawn as nn.Linear draws, by the layer's own generator."""
    linear = nn.Linear(like.shape[-1], 2, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            drawn = (torch.rand(parameter.shape, generator=generator, device="cpu") * 2 - 1) / math.sqrt(like.shape[-1])
            parameter.copy_(drawn)
    return linear
