"""Language models: any transformers decoder whose attention can be replaced by ours."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moevlm.batch import Head
from moevlm.models.attention import PACKED_ATTENTION

PACKABLE_LAYER_TYPES = ("full_attention", "sliding_attention")


def build_decoder(source: str | dict[str, Any], *, vocab_size: int | None = None) -> PreTrainedModel:
    """A causal language model with packed attention, in float32.

    Args:
        source: hub id or folder of a pretrained model, or a config (``{"model_type": "qwen2", ...}``) for random
            weights. A config with ``weights``, a hub id or folder, is loaded from there and compared with what it says.
        vocab_size: the tokenizer's number of ids; checked against the embedding table.

    Raises:
        ValueError: no such folder, unknown model type, a decoder whose sequences cannot be packed, too small a
            vocabulary, or weights of another shape than the config beside them says.
    """
    if isinstance(source, dict):
        shape = {key: value for key, value in source.items() if key != "weights"}
        source = source.get("weights") or shape
    else:
        shape = {}
    if isinstance(source, dict):
        model = _from_config(source)
    else:
        model = _from_pretrained(source, shape)
    if vocab_size is not None and model.config.vocab_size < vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids, the language model {source!r} embeds only {model.config.vocab_size}; "
            "set model.language_model and the tokenizer to a pair that belongs together"
        )
    return model  # type: ignore[no-any-return]


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, whatever the architecture calls them."""
    num_layers = language_model.config.num_hidden_layers
    for module in language_model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"no list of {num_layers} layers found in {type(language_model).__name__}")


def context_length(config: Any) -> int | None:
    """Tokens that a sequence may have; None where the architecture sets no limit.

    With LongRoPE (arXiv:2402.13753; Phi-3's 128k models) one sequence beyond the original context changes the
    frequencies of every sequence beside it, so there the original context is the limit: a sample never depends on
    its batch-mates.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one, or one per type of layer
    originals = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min([*originals, *([] if limit is None else [limit])], default=None)


def language_model_head(language_model: PreTrainedModel) -> Head:
    """Weight, bias, soft cap and scale of the vocabulary projection."""
    output = language_model.get_output_embeddings()
    config = language_model.config
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies, Granite divides
    if scale is None:
        scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    bias: Tensor | None = getattr(output, "bias", None)
    return Head(output.weight, bias, getattr(config, "final_logit_softcapping", None), float(scale))


def _from_config(settings: dict[str, Any]) -> PreTrainedModel:
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            "a language model config needs model_type, for example qwen2; set model.language_model.model_type"
        )
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        if model_type in CONFIG_MAPPING:  # the type is known, a value beside it is not
            raise ValueError(f"{model_type} refuses its config: {error}; set model.language_model") from error
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING.keys(), n=3)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(
            f"unknown model_type {model_type!r}{meant}; allowed are those of transformers' decoders; "
            "set model.language_model.model_type"
        ) from error
    _check_packable(config)
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)  # type: ignore[no-any-return]


def _check_shape(config: Any, shape: dict[str, Any], source: str) -> None:
    differences = [
        f"{key} is {getattr(config, key, None)!r}, not {value!r}"
        for key, value in shape.items()
        if getattr(config, key, None) != value
    ]
    if differences:
        raise ValueError(
            f"{source} has another shape than the config says: {'; '.join(differences)}; set "
            "model.language_model.weights, or the other keys of model.language_model to its shape"
        )


def _from_pretrained(source: str, shape: dict[str, Any]) -> PreTrainedModel:
    """Load strictly: transformers itself draws what a checkpoint lacks anew, and only logs it."""
    _check_folder(source)
    try:
        config = AutoConfig.from_pretrained(source)
        _check_shape(config, shape, source)
        _check_packable(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, attn_implementation=PACKED_ATTENTION, dtype="float32", output_loading_info=True
        )
        model, report = loaded
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no language model at {source!r}: {reason}; set model.language_model to a hub id, a complete folder, or a "
            "config with model_type"
        ) from error
    lost = sorted(report["missing_keys"]) + [str(entry) for entry in report["mismatched_keys"]]
    if lost:
        raise ValueError(
            f"{source} does not hold all weights of its {config.model_type}: {', '.join(lost[:3])} ({len(lost)} in "
            "all) are missing or of another shape; copy or download it again, or set model.language_model"
        )
    return model  # type: ignore[no-any-return]


def _check_folder(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith("."):
            raise ValueError(f"no folder {source}; set model.language_model to a hub id or an existing folder")
        return
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"{source} holds no config.json; set model.language_model to the folder of a transformers model"
        )
    if json.loads(config_file.read_text()).get("format") == "moevlm":
        raise ValueError(f"{source} is a whole VLM, not a language model; set model.weights to it instead")


def _check_packable(config: Any) -> None:
    layer_types = set(getattr(config, "layer_types", None) or ())
    if not layer_types <= set(PACKABLE_LAYER_TYPES):
        raise ValueError(
            f"{config.model_type} has layers of type {', '.join(sorted(layer_types))}; only "
            f"{', '.join(PACKABLE_LAYER_TYPES)} keep packed sequences apart; "
            "set model.language_model to another decoder"
        )
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    takes_our_attention = model_class is not None and (
        getattr(model_class, "_supports_attention_backend", False) or model_class._can_set_attn_implementation()
    )
    if not takes_our_attention or getattr(model_class, "_is_stateful", False):
        raise ValueError(
            f"{config.model_type} cannot keep packed sequences apart: it takes no registered attention function, or "
            "has recurrent layers; set model.language_model to another decoder"
        )
