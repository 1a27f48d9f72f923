"""Model folders: config.json and safetensors files, enough to rebuild a VLM anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.initialization import no_init_weights

from moevlm.models.adapter_settings import LoRASettings
from moevlm.models.adapters import add_lora, full_tensors, lora_config, quantize_bases
from moevlm.models.checkpoints.tensor_files import TensorFiles, local_folder, plan_shards, write_tensor_files
from moevlm.models.connector import build_connector
from moevlm.models.decoder import build_decoder
from moevlm.models.modular import ModularVLM
from moevlm.models.moe.router import Router
from moevlm.models.moe.settings import MoESettings
from moevlm.models.upcycling import make_sparse
from moevlm.models.vision_encoder import VisionEncoder
from moevlm.models.vlm import VLM

FORMAT = "moevlm"
FORMAT_VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_pretrained(vlm: VLM, folder: str | Path, *, dtype: str | None = None, max_shard_gib: float = 4.0) -> None:
    """Write a model folder. Under FSDP2 every rank must call this; the first one writes.

    Shared tensors (tied embeddings) are written once. Each file appears under its name only when complete, config.json
    last; no more than one shard is gathered at a time.

    Args:
        dtype: of the stored weights, routers excepted, which stay float32; None keeps each parameter's own.
        max_shard_gib: larger models are cut into several files with an index.

    Raises:
        ValueError: an unknown dtype, or a shard size that is not positive.
    """
    if max_shard_gib <= 0:
        raise ValueError(f"max_shard_gib must be positive, got {max_shard_gib}")
    target = _dtype(dtype)
    routers = _router_tensor_names(vlm)
    is_writer = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    own = full_tensors(vlm, own_tensors(vlm))
    dtypes = {name: own[name].dtype if target is None or name in routers else target for name in own}

    def read_shard(names: Iterable[str]) -> dict[str, Tensor] | None:
        tensors = {}
        for name in names:
            tensor = own[name]
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if is_writer:
                tensors[name] = whole.detach().to("cpu", dtypes[name]).contiguous()
        return tensors if is_writer else None

    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in own.items()}
    write_tensor_files(folder, plan_shards(sizes, max_bytes=int(max_shard_gib * 2**30)), read_shard)
    if is_writer:
        config_file = Path(folder) / "config.json.tmp"
        config_file.write_text(json.dumps(model_config(vlm), indent=2) + "\n")
        config_file.replace(Path(folder) / "config.json")


def load_pretrained(
    folder: str | Path, *, dtype: str | None = None, gradient_checkpointing: bool | str | Sequence[str] = False
) -> VLM:
    """Rebuild the VLM of a model folder, in eval mode.

    Args:
        folder: as `save_pretrained` leaves it, or ``hf-hub:owner/name`` of one that was uploaded.
        dtype: of the parameters, routers excepted; None means float32.

    Raises:
        ValueError: no model folder, or weights that do not belong to its config.
    """
    folder = local_folder(folder)
    return rebuild(
        read_config(folder),
        TensorFiles(folder),
        source=folder,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
    )


def rebuild(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    source: str | Path,
    dtype: str | None = None,
    gradient_checkpointing: bool | str | Sequence[str] = False,
) -> VLM:
    """A VLM from the content of a config.json and its tensors under our names, in eval mode.

    Args:
        config: `model_config` says what it holds.
        tensors: exactly those of the model; shared ones once.
        source: named in errors.
        dtype: as in `load_pretrained`.
    """
    with no_init_weights():  # every weight is about to be loaded
        vlm = _build(config, gradient_checkpointing=gradient_checkpointing)
    vlm.language_model.tie_weights()  # part of what was left out above
    own = own_tensors(vlm)
    found = {name: tensors.shape(name) if isinstance(tensors, TensorFiles) else tensors[name].shape for name in tensors}
    _check_same_model(source, {name: tuple(tensor.shape) for name, tensor in own.items()}, found)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    cast_parameters(vlm, dtype or "float32")
    return quantize_bases(vlm).eval()


def model_config(vlm: VLM) -> dict[str, Any]:
    """What config.json holds: the arguments that rebuild the four parts."""
    language_model = vlm.language_model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "dtype"):
        language_model.pop(key, None)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "vision_encoder": None if vlm.vision_encoder is None else vlm.vision_encoder.config,
        "connector": None if vlm.connector is None else vlm.connector.kind,
        "language_model": language_model,
        "moe": vlm.moe,
        "lora": lora_config(vlm),
    } | _modular_config(vlm)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        ValueError: there is none, or it is of something else.
    """
    path = local_folder(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"no model folder at {folder}: {path.name} is missing; set model.weights to a folder with one")
    config: dict[str, Any] = json.loads(path.read_text())
    if config.get("format") != FORMAT or config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} is no model folder of format {FORMAT} {FORMAT_VERSION} (found "
            f"{config.get('format') or config.get('model_type')} {config.get('format_version', '')}); a bare language "
            "model goes into model.language_model, checkpoints of LLaVA and MoE-LLaVA go through "
            "experiments.import_checkpoint"
        )
    return config


def cast_parameters(module: nn.Module, dtype: str) -> nn.Module:
    """Cast parameters in place, routers excepted. Buffers stay: RoPE frequencies must keep float32."""
    target = _dtype(dtype)
    assert target is not None
    for part in module.modules():
        if not isinstance(part, Router):
            for parameter in part.parameters(recurse=False):
                if parameter.is_floating_point():  # weights in 4 bits are bytes
                    parameter.data = parameter.data.to(target)
    return module


def _build(config: dict[str, Any], *, gradient_checkpointing: bool | str | Sequence[str]) -> VLM:
    language_model = build_decoder(config["language_model"])
    vision_encoder = connector = None
    if config["vision_encoder"] is not None:
        vision_encoder = VisionEncoder(**config["vision_encoder"])
        connector = build_connector(
            config["connector"], vision_encoder.width, language_model.config.hidden_size, vision_encoder.num_tokens
        )
    vlm = VLM(vision_encoder, connector, language_model, gradient_checkpointing=gradient_checkpointing)
    if config.get("modular") is not None:
        return ModularVLM(vlm, **config["modular"])
    if config["moe"] is not None:
        make_sparse(vlm, MoESettings.from_dict(config["moe"]), initialise=False)
    if config.get("lora") is not None:  # folders of before have no such key
        add_lora(vlm, LoRASettings.from_dict(config["lora"]), quantize=False)
    return vlm


def _modular_config(vlm: VLM) -> dict[str, Any]:
    if not isinstance(vlm, ModularVLM):
        return {}
    return {"modular": {"num_experts": vlm.num_experts, "has_common": vlm.has_common}}


def own_tensors(vlm: VLM) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each shared one once, under its first name."""
    persistent = vlm.state_dict().keys()
    tensors: dict[str, Tensor] = dict(vlm.named_parameters())
    tensors.update((name, buffer) for name, buffer in vlm.named_buffers() if name in persistent)
    return tensors


def _router_tensor_names(vlm: VLM) -> set[str]:
    routers = [(name, module) for name, module in vlm.named_modules() if isinstance(module, Router)]
    return {f"{name}.{key}" for name, module in routers for key in module.state_dict()}


def _check_same_model(
    source: str | Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    faults += [f"unexpected {name} {tuple(shape)}" for name, shape in found.items() if name not in expected]
    faults += [
        f"{name} is {tuple(found[name])}, not {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise ValueError(
            f"{source} is a checkpoint of another model: {shown}; set model.weights to a checkpoint of this model, or "
            "change model.vision_encoder, model.connector, model.language_model or model.moe to the checkpoint's"
        )


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}; set model.dtype")
    return None if name is None else DTYPES[name]
