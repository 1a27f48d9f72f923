"""Vision encoders: a timm ViT, read out at one of its blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CUSTOM_VIT = "vit"
HUB_PREFIXES = ("hf-hub:", "timm/")


class VisionEncoder(nn.Module):
    """Patch features of an image, taken after block `feature_layer`, as LLaVA does (arXiv:2304.08485, section 4.1).

    The features come without the final norm; blocks above the feature layer, the final norm and the classifier are
    not kept. Notes on real weights: OpenAI's CLIP weights need the ``..._clip_quickgelu_...`` names.
    """

    def __init__(
        self,
        name: str,
        *,
        feature_layer: int = -2,
        keep_cls: bool = False,
        image_size: int | None = None,
        weights: str | None = None,
        timm_options: dict[str, Any] | None = None,
    ) -> None:
        """Build, with random weights unless `weights` says otherwise.

        Args:
            name: a timm ViT (``vit_large_patch14_clip_quickgelu_336.openai``), or ``vit`` for timm's VisionTransformer
                with `timm_options` alone.
            feature_layer: block whose output is used; from 0, or negative from the end (-1 is the last).
            keep_cls: keep the CLS and register tokens in front of the patches.
            image_size: side in pixels; None is the model's own.
            weights: hub id (``timm/...`` or ``hf-hub:...``), a .safetensors file, or a folder with model.safetensors.
            timm_options: further arguments of the timm model (embed_dim, depth, num_heads, patch_size, ...).

        Raises:
            ValueError: unknown name, no ViT, a layer that is not there, weights of another model.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "name": name,
            "feature_layer": feature_layer,
            "keep_cls": keep_cls,
            "image_size": image_size,
            "timm_options": dict(timm_options or {}),
        }
        vit = _build_vit(name, image_size, weights, dict(timm_options or {}))
        depth = len(vit.blocks)
        if not -depth <= feature_layer < depth:
            raise ValueError(
                f"feature_layer must lie in [{-depth}, {depth - 1}] for {name} with {depth} blocks, got "
                f"{feature_layer}; set model.vision_encoder.feature_layer"
            )
        vit.blocks = vit.blocks[: feature_layer % depth + 1]
        vit.norm, vit.fc_norm, vit.head, vit.attn_pool = nn.Identity(), nn.Identity(), nn.Identity(), None
        self.vit = vit
        self.keep_cls = keep_cls
        self.gradient_checkpointing = False
        height, width = vit.patch_embed.img_size
        if height != width:
            raise ValueError(
                f"images must be square, {name} takes {height} x {width}; set model.vision_encoder.image_size"
            )
        self.image_size: int = height
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.width: int = vit.embed_dim
        self.num_tokens: int = vit.patch_embed.num_patches + (vit.num_prefix_tokens if keep_cls else 0)
        pretrained_cfg = getattr(vit, "pretrained_cfg", None) or {}
        self.mean: tuple[float, float, float] = tuple(pretrained_cfg.get("mean") or (0.5, 0.5, 0.5))
        self.std: tuple[float, float, float] = tuple(pretrained_cfg.get("std") or (0.5, 0.5, 0.5))
        if weights is not None and not weights.startswith(HUB_PREFIXES):
            self._load_file(weights)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """[N, 3, H, W] normalised images -> [N, P, Dv] features.

        Raises:
            ValueError: images of another size than the encoder's.
        """
        if tuple(images_N3HW.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(
                f"the vision encoder takes images of 3 x {self.image_size} x {self.image_size}, got "
                f"{' x '.join(map(str, images_N3HW.shape[1:]))}; set the image transform's image_size or "
                "model.vision_encoder.image_size"
            )
        vit = self.vit
        features_NPD = vit.patch_embed(images_N3HW.to(vit.patch_embed.proj.weight.dtype))
        features_NPD = vit.norm_pre(vit.patch_drop(vit._pos_embed(features_NPD)))
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in vit.blocks:
            if recompute:
                features_NPD = checkpoint(block, features_NPD, use_reentrant=False)
            else:
                features_NPD = block(features_NPD)
        return features_NPD if self.keep_cls else features_NPD[:, vit.num_prefix_tokens :]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json (this class's arguments) and model.safetensors (timm's own names)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        state = {name: tensor.detach().contiguous() for name, tensor in self.vit.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VisionEncoder:
        """Rebuild what `save_pretrained` wrote.

        Raises:
            ValueError: no such folder.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"no vision encoder in {folder}: {path.name} is missing; set model.vision_encoder")
        return cls(**json.loads(path.read_text()), weights=str(folder))

    def _load_file(self, weights: str) -> None:
        path = Path(weights)
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no vision weights at {path}; set model.vision_encoder.weights")
        state = {key: tensor.float() for key, tensor in load_file(path).items()}
        loaded = checkpoint_filter_fn(state, self.vit)
        unused = ("norm.", "fc_norm.", "head.", "attn_pool.", *(f"blocks.{i}." for i in _beyond(loaded, self.vit)))
        loaded = {key: tensor for key, tensor in loaded.items() if not key.startswith(unused)}
        expected = self.vit.state_dict()
        faults = [f"missing {key}" for key in expected.keys() - loaded.keys()]
        faults += [f"unexpected {key}" for key in loaded.keys() - expected.keys()]
        faults += [
            f"{key} is {tuple(loaded[key].shape)}, not {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in loaded and loaded[key].shape != tensor.shape
        ]
        if faults:
            raise ValueError(
                f"{path} holds another vision encoder than {self.config['name']}: {'; '.join(sorted(faults)[:5])} "
                f"({len(faults)} differences); set model.vision_encoder.weights or its name and timm_options"
            )
        self.vit.load_state_dict(loaded)


def _build_vit(name: str, image_size: int | None, weights: str | None, options: dict[str, Any]) -> Any:
    if image_size is not None:
        options["img_size"] = image_size
    if name == CUSTOM_VIT:
        if weights is not None and weights.startswith(HUB_PREFIXES):
            raise ValueError(f"a custom vit takes local weights, got {weights!r}; set model.vision_encoder.weights")
        try:
            return VisionTransformer(num_classes=0, **options)
        except TypeError as error:
            raise ValueError(f"{error}; set model.vision_encoder.timm_options") from error
    overlay = None
    if weights is not None and weights.startswith(HUB_PREFIXES):
        overlay = {"hf_hub_id": weights.removeprefix("hf-hub:"), "source": "hf-hub"}
    try:
        vit = timm.create_model(
            name, pretrained=overlay is not None, pretrained_cfg_overlay=overlay, num_classes=0, **options
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{error}; timm.list_models('vit*') lists the known names; set model.vision_encoder.name"
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"{name} is a {type(vit).__name__}, not a ViT; set model.vision_encoder.name to a vit_* model")
    return vit


def _beyond(state: dict[str, Tensor], vit: Any) -> list[int]:
    """Blocks of a checkpoint that lie above the feature layer."""
    blocks = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    return sorted(block for block in blocks if block >= len(vit.blocks))
