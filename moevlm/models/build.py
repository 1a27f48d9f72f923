"""One function that builds any VLM from plain values; conf/model/ names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moevlm.models.adapter_settings import LoRASettings
from moevlm.models.adapters import add_lora
from moevlm.models.connector import build_connector
from moevlm.models.decoder import build_decoder
from moevlm.models.inheriting import fetch_connector, keep_layers
from moevlm.models.moe.settings import INITIAL_KEYS, RUNNING_KEYS, MoESettings
from moevlm.models.pretrained import cast_parameters, load_pretrained, read_config
from moevlm.models.upcycling import make_sparse, resolved
from moevlm.models.varlen import check_kernel_name
from moevlm.models.vision_encoder import VisionEncoder
from moevlm.models.vlm import VLM


def build_vlm(
    vision_encoder: str | dict[str, Any] | None,
    connector: str | None,
    language_model: str | dict[str, Any],
    *,
    moe: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    weights: str | None = None,
    layers: Sequence[int] | None = None,
    connector_from: str | None = None,
    vocab_size: int | None = None,
    gradient_checkpointing: bool | str | Sequence[str] = False,
    attention: str = "auto",
    compile: bool = False,
    seed: int = 0,
    dtype: str = "float32",
) -> VLM:
    """Build a VLM from pretrained or random parts, or continue from a model folder; it comes in training mode.

    The same arguments give the same weights; the global random state is left as it was.

    Args:
        vision_encoder: arguments of `VisionEncoder`, or a folder that it saved; None for a blind model.
        connector: a kind that `build_connector` knows; None beside `weights` takes whatever the folder has.
        language_model: hub id, folder, or config of the decoder.
        moe: arguments of `upcycle`; None leaves the model as it is.
        lora: keys of `LoRASettings`: adapters on the decoder's linear maps; None leaves the model as it is.
        weights: a model folder. All parts then come from it, and the arguments above are only compared with it, so a
            next stage keeps its model settings. A dense folder is upcycled if `moe` asks for it.
        layers: of the folder in `weights`, keep only these decoder layers: a student made from its teacher.
        connector_from: a teacher's model folder, whose connector becomes the first part of a connector of two.
        vocab_size: the tokenizer's number of ids, to be checked.
        gradient_checkpointing: what the decoder's layers keep for the backward pass, a policy of
            `moevlm.models.execution` or a list that is repeated over the layers; true is "full".
        attention: of packed sequences, one of `moevlm.models.varlen.KERNELS`.
        compile: the decoder's layers and the vision encoder's blocks, by torch.compile.
        seed: of every random weight.
        dtype: of the parameters, routers excepted (always float32).

    Raises:
        ValueError: settings that do not fit together, or a model folder of another model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if weights is None:
            vlm = _from_parts(vision_encoder, connector, language_model, vocab_size, gradient_checkpointing)
        else:
            config = read_config(weights)
            _check_same_parts(config, vision_encoder, connector, language_model, weights)
            vlm = load_pretrained(weights, gradient_checkpointing=gradient_checkpointing)
            _check_vocabulary(vlm, vocab_size, weights)
        if layers is not None:
            if weights is None:
                raise ValueError("layers are taken from a model folder; set model.weights, or model.layers=null")
            vlm = keep_layers(vlm, layers)
        if connector_from is not None:
            vlm = fetch_connector(vlm, connector_from)
        if moe is not None:
            vlm = _make_sparse(vlm, moe, seed, weights)
        cast_parameters(vlm, dtype)
        if lora is not None:
            _adapt(vlm, LoRASettings.from_dict(lora), weights)
    check_kernel_name(attention)
    vlm.attention = attention
    if compile:
        vlm.compile_layers()
    return vlm.train()


def _from_parts(
    vision_settings: str | dict[str, Any] | None,
    connector_kind: str | None,
    language_model_source: str | dict[str, Any],
    vocab_size: int | None,
    gradient_checkpointing: bool | str | Sequence[str],
) -> VLM:
    vision_encoder = None
    if isinstance(vision_settings, str):
        vision_encoder = VisionEncoder.from_pretrained(vision_settings)
    elif vision_settings is not None:
        vision_encoder = VisionEncoder(**vision_settings)
    language_model = build_decoder(language_model_source, vocab_size=vocab_size)
    connector = None
    if vision_encoder is not None and connector_kind is None:
        raise ValueError("a vision encoder needs a connector; set model.connector")
    if vision_encoder is not None and connector_kind is not None:
        connector = build_connector(
            connector_kind, vision_encoder.width, language_model.config.hidden_size, vision_encoder.num_tokens
        )
    return VLM(vision_encoder, connector, language_model, gradient_checkpointing=gradient_checkpointing)


def _make_sparse(vlm: VLM, moe: dict[str, Any], seed: int, weights: str | None) -> VLM:
    settings = MoESettings.from_dict({"seed": seed, **moe})
    if vlm.moe is None:
        if vlm.lora is not None:
            raise ValueError(
                f"{weights} has LoRA adapters, which hide what experts are copied from; merge them first with "
                "moevlm.models.adapters.merge_lora, or set model.moe=null"
            )
        return make_sparse(vlm, settings)
    found, wanted = vlm.moe, resolved(settings, vlm.language_model.config.num_hidden_layers).as_dict()
    differences = [
        f"{key} is {found[key]}, not {wanted[key]}"
        for key in wanted
        if key not in (*INITIAL_KEYS, *RUNNING_KEYS) and found[key] != wanted[key]
    ]
    if differences:
        raise ValueError(
            f"{weights} is sparse already, and otherwise than asked: {'; '.join(differences)}; set model.moe=null to "
            "take it as it is, or model.weights to a dense folder"
        )
    for layer in vlm.moe_layers.values():
        layer.use_kernel(settings.kernel)
    return vlm


def _adapt(vlm: VLM, settings: LoRASettings, weights: str | None) -> None:
    if vlm.lora is None:
        add_lora(vlm, settings)
    elif vlm.lora != settings:
        raise ValueError(
            f"{weights} has LoRA adapters already, and others than asked: {vlm.lora}; set model.lora=null to take them "
            "as they are"
        )


def _check_same_parts(
    config: dict[str, Any],
    vision_encoder: str | dict[str, Any] | None,
    connector: str | None,
    language_model: str | dict[str, Any],
    weights: str,
) -> None:
    """Refuse a folder that contradicts the settings given beside it; a hub id or path of a decoder is not compared."""
    differences = []
    if (vision_encoder is None) != (config["vision_encoder"] is None):
        differences.append(f"vision_encoder is {config['vision_encoder']}, not {vision_encoder}")
    elif vision_encoder is not None:
        if connector is not None and connector != config["connector"]:
            differences.append(f"connector is {config['connector']!r}, not {connector!r}")
        if isinstance(vision_encoder, dict):
            differences += _different(config["vision_encoder"], vision_encoder, "vision_encoder")
    if isinstance(language_model, dict):
        differences += _different(config["language_model"], language_model, "language_model")
    if differences:
        raise ValueError(
            f"{weights} is a checkpoint of another model: {'; '.join(differences)}; change model.weights, or these "
            "model settings to the checkpoint's"
        )


def _different(found: dict[str, Any], wanted: dict[str, Any], part: str) -> list[str]:
    return [
        f"{part}.{key} is {found[key]!r}, not {value!r}"
        for key, value in wanted.items()
        if key in found and (found[key] or None) != (value or None)
    ]


def _check_vocabulary(vlm: VLM, vocab_size: int | None, weights: str) -> None:
    known = vlm.language_model.config.vocab_size
    if vocab_size is not None and known < vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids, the model in {weights} embeds only {known}; set model.weights"
        )
