"""Experts that were trained apart, merged behind a new router (PLE of arXiv:2407.19610; BTX, arXiv:2403.07816)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moevlm.models.decoder import decoder_layers
from moevlm.models.modular import ModularVLM
from moevlm.models.moe.experts import StackedExperts, dense_parts
from moevlm.models.moe.settings import MoESettings
from moevlm.models.pretrained import load_pretrained
from moevlm.models.upcycling import make_sparse
from moevlm.models.vlm import VLM

SHARED = ("equal", "mean", "first")


def build_modular(
    base: str | None = None,
    *,
    experts: Sequence[str] = (),
    num_experts: int | None = None,
    common: bool = False,
    weights: str | None = None,
    gradient_checkpointing: bool | str | Sequence[str] = False,
    seed: int = 0,
    **unused: Any,
) -> ModularVLM:
    """A model of whole-model experts, in training mode.

    Args:
        base: a dense model folder of which every expert starts as a copy (JEET, MoE-CE).
        experts: dense model folders, one for each domain, that differ in their decoder layers and norms only (PLE):
            train them with embeddings, head, connector and vision encoder frozen.
        num_experts: of `base`; that of `experts` is known.
        common: one more expert for every sequence, which starts as a copy of `base`, or of the first expert.
        weights: a folder that a modular model wrote; what is given beside it is not looked at.
        seed: of the router.

    Raises:
        ValueError: neither or several of base, experts and weights, or experts that differ in what is shared.
    """
    if weights is not None:
        vlm = load_pretrained(weights, gradient_checkpointing=gradient_checkpointing)
        if not isinstance(vlm, ModularVLM):
            raise ValueError(f"{weights} is no modular model; set model.base to start from a dense one")
        return vlm.train()
    if (base is None) == (not experts):
        raise ValueError("a modular model starts either from model.base or from model.experts; set one of them")
    first = load_pretrained(base if base is not None else experts[0], gradient_checkpointing=gradient_checkpointing)
    _check_dense(first, base or experts[0])
    vlm = ModularVLM(first, num_experts=len(experts) or num_experts or 0, has_common=common, seed=seed)
    for decoder, folder in zip(vlm.other_decoders, experts[1:]):
        other = load_pretrained(folder)
        _check_same(first, other, folder, own="decoder")
        state = other.language_model.get_decoder().state_dict()
        decoder.load_state_dict({name: state[name] for name in decoder.state_dict()})
    return vlm.train()


def build_merged(
    experts: Sequence[str],
    *,
    moe: dict[str, Any] | None = None,
    shared: str = "equal",
    weights: str | None = None,
    gradient_checkpointing: bool | str | Sequence[str] = False,
    seed: int = 0,
) -> VLM:
    """A sparse model whose FFN experts are those of dense models, one for each domain, in training mode.

    Args:
        experts: dense model folders of one shape.
        moe: keys of `MoESettings` but num_experts: placement (by default all layers), top_k (by default 1), ...
        shared: what becomes of all other weights: "equal" demands that they do not differ (train the experts with
            ``trainable: ['^language_model.*[.]mlp[.]']``), "mean" averages them (BTX), "first" takes the first model's.
        weights: a folder that such a model wrote, to go on from; `experts` are then not read.
        seed: of the routers.

    Raises:
        ValueError: too few experts, models of another shape, or shared weights that differ.
    """
    if weights is not None:
        return load_pretrained(weights, gradient_checkpointing=gradient_checkpointing).train()
    if len(experts) < 2 or shared not in SHARED:
        raise ValueError(
            f"merging needs at least 2 experts and shared in {SHARED}, got {len(experts)} and {shared!r}; "
            "set model.experts and model.shared"
        )
    models = [load_pretrained(folder, gradient_checkpointing=gradient_checkpointing) for folder in experts]
    for model, folder in zip(models, experts):
        _check_dense(model, folder)
        _check_same(models[0], model, folder, own="ffn" if shared == "equal" else "any")
    networks = [
        [dense_parts(layer.get_submodule("mlp"))[0] for layer in decoder_layers(model.language_model)]
        for model in models
    ]
    vlm = models[0]
    settings = {"placement": "all", "top_k": 1, "seed": seed, **(moe or {}), "num_experts": len(experts)}
    if shared == "mean":
        _average(models)
    make_sparse(vlm, MoESettings.from_dict(settings))
    with torch.no_grad():
        for index, layer in vlm.moe_layers.items():
            assert isinstance(layer.experts, StackedExperts)
            for number, network in enumerate(networks):
                for projection in network[index]:
                    layer.experts.get_parameter(projection.name)[number] = projection.weight
                    if projection.bias is not None:
                        layer.experts.get_parameter(f"{projection.name}_bias")[number] = projection.bias
    return vlm.train()


def _check_dense(vlm: VLM, folder: str) -> None:
    if vlm.moe_layers or isinstance(vlm, ModularVLM):
        raise ValueError(f"{folder} is sparse already; experts are merged from dense models")


def _check_same(first: VLM, other: VLM, folder: str, *, own: str) -> None:
    """Refuse models that differ elsewhere than an expert may."""
    there, here = dict(other.named_parameters()), dict(first.named_parameters())
    shapes = [name for name in here | there if _shape(here, name) != _shape(there, name)]
    if shapes:
        raise ValueError(f"{folder} has another shape than the first expert, in {shapes[0]}; set model.experts")
    if own == "any":
        return
    blocks = {id(parameter) for parameter in _own_parameters(first, own)}
    differing = [
        name for name, value in here.items() if id(value) not in blocks and not torch.equal(value, there[name])
    ]
    if differing:
        raise ValueError(
            f"{folder} and the first expert differ in {len(differing)} weights that experts share, such as "
            f"{differing[0]}; train the experts with these frozen, or set model.shared=mean for FFN experts"
        )


def _shape(parameters: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(parameters[name].shape) if name in parameters else None


def _own_parameters(vlm: VLM, own: str) -> Iterator[Tensor]:
    decoder = vlm.language_model.get_decoder()
    if own == "decoder":
        embeddings = {id(parameter) for parameter in decoder.get_input_embeddings().parameters()}
        yield from (parameter for parameter in decoder.parameters() if id(parameter) not in embeddings)
        return
    for layer in decoder_layers(vlm.language_model):
        yield from layer.get_submodule("mlp").parameters()


@torch.no_grad()
def _average(models: Sequence[VLM]) -> None:
    others = [dict(model.named_parameters()) for model in models[1:]]
    for name, parameter in models[0].named_parameters():
        parameter.copy_(torch.stack([parameter, *(other[name] for other in others)]).mean(dim=0))
