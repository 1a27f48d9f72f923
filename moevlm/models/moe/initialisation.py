"""Where the experts of an upcycled layer start: copies of a dense network, slices of it, or partly drawn anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moevlm.models.moe.experts import Projection, stack
from moevlm.models.moe.settings import MoESettings

Network = Sequence[Projection]
"""A dense feed-forward network: maps to the F hidden units (one, or gate and up), then the map back."""


def num_hidden_units(network: Network) -> int:
    """F: rows of the first map."""
    return network[0].weight.shape[0]


def take_units(network: Network, start: int, stop: int) -> list[Projection]:
    """The network of hidden units [start, stop); over a partition these add up to the whole, but for the last bias."""
    *into, back = network
    rows = [Projection(p.name, p.weight[start:stop], None if p.bias is None else p.bias[start:stop]) for p in into]
    return [*rows, Projection(back.name, back.weight[:, start:stop], back.bias)]


def split_shared(network: Network, settings: MoESettings) -> tuple[list[Projection] | None, list[Projection]]:
    """The networks of a layer's shared expert (None without one) and of its routed experts.

    ``partition``: the shared expert takes the first ``shared_fraction`` of the hidden units and the output bias, the
    routed experts the other units. ``full``: both are the whole network; `routed_experts` then zeroes the routed
    experts' way out. Either way shared plus routed equals dense.

    Raises:
        ValueError: a partition that leaves one side without units.
    """
    if settings.shared_expert is None:
        return None, list(network)
    if settings.shared_expert == "full":
        return list(network), list(network)
    assert settings.shared_fraction is not None
    width = num_hidden_units(network)
    cut = round(settings.shared_fraction * width)
    if not 0 < cut < width:
        raise ValueError(
            f"shared_fraction={settings.shared_fraction} of {width} hidden units leaves {cut} to the shared expert and "
            f"{width - cut} to the routed ones; set model.moe.shared_fraction"
        )
    return take_units(network, 0, cut), _without_last_bias(take_units(network, cut, width))


def routed_experts(
    network: Network, num_experts: int, settings: MoESettings, generator: torch.Generator, *, initialise: bool = True
) -> list[Projection]:
    """Stacked weights [E, out, in] of a layer's routed experts.

    Args:
        network: what each expert, or each virtual group of experts, starts as.
        generator: on the CPU, so that a seed means the same weights on every device.
        initialise: False gives shapes only, for weights about to be loaded.

    Raises:
        ValueError: hidden units that do not divide into slices.
    """
    slices = _slices(network, settings.granularity)
    projections = stack([slices[expert % len(slices)] for expert in range(num_experts)])
    if not initialise or projections[0].weight.is_meta:
        return projections
    if settings.initialisation == "virtual_groups":
        _scale_weights(projections, num_experts, settings)
    elif settings.initialisation == "noise":
        assert settings.init_noise is not None
        _add_noise(projections, settings.init_noise, generator)
    elif settings.initialisation == "drop_upcycling":
        assert settings.reinit_fraction is not None
        _redraw_units(projections, settings.reinit_fraction, generator)
    if settings.shared_expert == "full":
        projections[-1].weight.zero_()
        if projections[-1].bias is not None:
            projections[-1].bias.zero_()
    return projections


def _slices(network: Network, granularity: int) -> list[list[Projection]]:
    width = num_hidden_units(network)
    if width % granularity:
        raise ValueError(
            f"{width} hidden units do not divide into granularity={granularity} slices; set model.moe.granularity"
        )
    step = width // granularity
    return [take_units(network, start, start + step) for start in range(0, width, step)]


def _scale_weights(projections: Sequence[Projection], num_experts: int, settings: MoESettings) -> None:
    """Virtual groups (arXiv:2410.07524, section 3.2): make K weighted slices add up to the dense network.

    A slice's output has to grow by ``g / (weight_scale * total)``, total being what the K weights sum to: 1 when
    normalised, else K times the score of a zero logit (the paper's ``E G^2 / T`` for softmax). The factor goes to the
    maps through which the output is linear: half to ``up`` and half to ``down`` of a gated network, all to the way out
    of a plain one. (The paper scales every map, which is exact for its squared ReLU only.)
    """
    total = 1.0
    if not settings.normalises:
        total = settings.top_k * (1 / num_experts if settings.score == "softmax" else 0.5)
    factor = settings.granularity / (settings.weight_scale * total)
    *into, back = projections
    if len(into) == 2:
        up = into[1]
        up.weight.mul_(math.sqrt(factor))
        if up.bias is not None:
            up.bias.mul_(math.sqrt(factor))
        back.weight.mul_(math.sqrt(factor))
    else:
        back.weight.mul_(factor)
    if back.bias is not None:
        back.bias.mul_(factor / settings.granularity)  # every slice carries the whole bias


def _add_noise(projections: Sequence[Projection], relative_std: float, generator: torch.Generator) -> None:
    """``W_e + relative_std * std(W) * N(0, 1)``: breaks the symmetry of copies (ours: relative to each matrix)."""
    for projection in projections:
        if projection.weight.is_meta:
            continue
        std = projection.weight[0].float().std()
        noise = torch.randn(projection.weight.shape, generator=generator, device="cpu").to(projection.weight.device)
        projection.weight.add_((noise * (relative_std * std)).to(projection.weight.dtype))


def _redraw_units(projections: Sequence[Projection], fraction: float, generator: torch.Generator) -> None:
    """Drop-Upcycling (arXiv:2502.19261, section 3.2): each expert forgets its own choice of hidden units.

    Of the F units ``round(fraction * F)`` are drawn; their rows in the maps into them and their columns in the map back
    become N(mean, std) of the very entries they replace. Biases of the units likewise (ours; the paper has none).
    """
    *into, back = projections
    num_experts, width = into[0].weight.shape[:2]
    num_drawn = round(fraction * width)
    for expert in range(num_experts):
        units = torch.randperm(width, generator=generator, device="cpu")[:num_drawn].to(back.weight.device)
        for projection in into:
            _redraw(projection.weight[expert], units, 0, generator)
            if projection.bias is not None:
                _redraw(projection.bias[expert], units, 0, generator)
        _redraw(back.weight[expert], units, 1, generator)


def _redraw(weight: Tensor, units: Tensor, dim: int, generator: torch.Generator) -> None:
    old = weight.index_select(dim, units).float()
    if old.numel() < 2 or old.is_meta:  # no spread to draw from
        return
    drawn = torch.randn(old.shape, generator=generator, device="cpu").to(old.device) * old.std() + old.mean()
    weight.index_copy_(dim, units, drawn.to(weight.dtype))


def _without_last_bias(network: Network) -> list[Projection]:
    """The output bias is the shared expert's; the routed experts keep a zero one that may learn."""
    *into, back = network
    return [*into, Projection(back.name, back.weight, None if back.bias is None else torch.zeros_like(back.bias))]
