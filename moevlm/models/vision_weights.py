"""A vision encoder by itself: from wherever a model's config says it comes, and a name for its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from moevlm.models.checkpoints.tensor_files import TensorFiles, local_folder
from moevlm.models.pretrained import read_config
from moevlm.models.vision_encoder import VisionEncoder

PREFIX = "vision_encoder."


def load_encoder(vision_encoder: str | dict[str, Any] | None, weights: str | None = None) -> VisionEncoder:
    """The encoder that `build_vlm` gives a model of these arguments; nothing else of a model folder is read.

    Raises:
        ValueError: no encoder there, random weights, or a fault that `VisionEncoder` names.
    """
    if weights is not None:
        folder = local_folder(weights)
        settings = read_config(folder)["vision_encoder"]
        if settings is None:
            raise ValueError(f"{weights} is a blind model, which has no features; set data.vision_cache.enabled=false")
        encoder, files = VisionEncoder(**settings), TensorFiles(folder)
        state = {name.removeprefix(PREFIX): files[name].float() for name in files if name.startswith(PREFIX)}
        encoder.load_state_dict(state)
        return encoder
    if isinstance(vision_encoder, str):
        return VisionEncoder.from_pretrained(vision_encoder)
    if vision_encoder is None or vision_encoder.get("weights") is None:
        raise ValueError(
            f"a vision cache needs pretrained weights, got {vision_encoder}; set model.vision_encoder.weights, or "
            "data.vision_cache.enabled=false"
        )
    return VisionEncoder(**vision_encoder)


def hash_encoder(encoder: VisionEncoder) -> str:
    """Of all weights in float32, and of what says how features are taken from them."""
    config = {name: value for name, value in encoder.config.items() if name != "weights"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(encoder.vit.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
