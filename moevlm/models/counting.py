"""What a model costs: parameters a token meets, and floating-point operations, idle expert rows included.

An operation is a multiplication or an addition, so a linear map costs twice its weights per row. Norms, activations,
softmax, embeddings and gathers are left out, as FLOP counters do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from moevlm.models.decoder import context_length, decoder_layers
from moevlm.models.moe.experts import StackedExperts
from moevlm.models.moe.lora_experts import Experts
from moevlm.models.moe.moe_layer import SparseMoE
from moevlm.models.vision_encoder import VisionEncoder
from moevlm.models.vlm import VLM

REFERENCE_LENGTH = 2048
"""Tokens of a sequence at which attention is counted, or the decoder's context if that is shorter."""


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of a forward pass, per token of the decoder, and per image."""

    linear: float  # attention projections, dense feed-forward networks, whatever else is a linear layer
    attention: float  # scores and mixing, a causal mean over the sequence
    router: float
    experts: float  # top_k routed experts; shared and residual ones
    idle_experts: float  # what a static buffer of E x C rows computes beyond these in training, DeepSpeed's way
    head: float  # only for tokens whose logits are wanted
    image: float  # vision encoder and connector, per image

    @property
    def token(self) -> float:
        """What this suite computes: an expert has as many rows as tokens, no buffer is padded."""
        return self.linear + self.attention + self.router + self.experts + self.head

    @property
    def token_with_idle_rows(self) -> float:
        """The same with every expert's buffer filled up to its capacity."""
        return self.token + self.idle_experts


def count_flops(vlm: VLM, *, sequence_length: int | None = None) -> ForwardFlops:
    """Operations of one forward pass of `vlm`.

    Args:
        sequence_length: S of the attention, whose cost is ``2 * H * (d_key + d_value) * (S + 1) / 2`` per token and
            layer; a sliding window shortens it. None is `REFERENCE_LENGTH`, at most the context.
    """
    config = vlm.language_model.config
    context = context_length(config)
    length = sequence_length or min(REFERENCE_LENGTH, context or REFERENCE_LENGTH)
    layers = decoder_layers(vlm.language_model)
    linear = sum(_linear_flops(layer) for layer in layers)
    pair = 2.0 * config.num_attention_heads * sum(_head_sizes(config))  # one query and one key, all heads
    attention = sum(pair * _mean_keys(length, _window(config, index)) for index in range(len(layers)))
    moe = vlm.moe_layers.values()
    return ForwardFlops(
        linear=linear,
        attention=attention,
        router=sum(2.0 * layer.router.weight.numel() for layer in moe),
        experts=sum(_expert_flops(layer) for layer in moe),
        idle_experts=sum(_idle_flops(layer) for layer in moe),
        head=2.0 * vlm.head.weight.numel(),
        image=_image_flops(vlm),
    )


def training_flops(vlm: VLM, lengths: Sequence[int], *, num_targets: int, num_images: int) -> float:
    """Operations of a forward and backward pass over a packed row: the numerator of a model's FLOP utilisation (MFU).

    Per row and activated weight 2 forward, 2 more where a gradient passes it and 2 more where it is trained; of
    attention's own products as many forward and twice as many backward (PaLM, arXiv:2204.02311, appendix B, for a
    partly frozen model). What is computed again in the backward pass does not count. A gradient passes a layer if
    anything before or in it trains.

    Args:
        vlm: already frozen.
        lengths: [B] tokens of each sequence, visual ones included.
        num_targets: supervised tokens, whose logits are made.
        num_images: pictures that the vision encoder sees.
    """
    config, num_tokens = vlm.language_model.config, sum(lengths)
    passes, images, moe_layers = False, 0.0, vlm.moe_layers
    if vlm.vision_encoder is not None and vlm.connector is not None:
        passes = _trains(vlm.vision_encoder)
        images += _encoder_flops(vlm.vision_encoder) * (3 if passes else 1)
        images -= _patch_flops(vlm.vision_encoder) * passes  # none to the pixels
        for part in vlm.connector.modules():  # its linear maps follow one another
            if isinstance(part, nn.Linear):
                images += vlm.connector.num_tokens * _passed_flops(part, passes=passes)
                passes = passes or part.weight.requires_grad
    total = images * num_images
    passes = passes or _trains(vlm.language_model.get_input_embeddings())
    for index, layer in enumerate(decoder_layers(vlm.language_model)):
        passes = passes or _trains(layer)
        window = _window(config, index)
        pairs = sum(length * _mean_keys(length, window) for length in lengths)
        total += (3 if passes else 1) * pairs * 2.0 * config.num_attention_heads * sum(_head_sizes(config))
        total += num_tokens * _passed_flops(layer, passes=passes)
        if index in moe_layers:
            total += num_tokens * _expert_training_flops(moe_layers[index], passes=passes)
    head = vlm.head.weight
    return total + num_targets * 2.0 * head.numel() * (1 + passes + head.requires_grad)


def rows_per_token(layer: SparseMoE) -> float:
    """Expert rows per token that a static buffer of the training capacity computes: ``E * C / T``, rounding left out.

    ``capacity_factor * K``; K for a layer that drops nothing, as it has no buffer.
    """
    factor = layer.settings.capacity_factor
    return layer.top_k if factor is None else factor * layer.top_k


def _row_flops(experts: Experts) -> float:
    """Operations of one row through one expert."""
    matrices = [(name, parameter.numel()) for name, parameter in experts.named_parameters() if "_bias" not in name]
    if isinstance(experts, StackedExperts):
        return 2.0 * sum(number for _, number in matrices) / experts.num_experts
    return 2.0 * sum(number / (experts.num_experts if "lora_" in name else 1) for name, number in matrices)


def _expert_flops(layer: SparseMoE) -> float:
    beside = [part for part in (layer.shared_expert, layer.residual_expert) if part is not None]
    return layer.top_k * _row_flops(layer.experts) + sum(_row_flops(part) for part in beside)


def _idle_flops(layer: SparseMoE) -> float:
    return max(0.0, rows_per_token(layer) - layer.top_k) * _row_flops(layer.experts)


def _linear_flops(module: nn.Module) -> float:
    """Every nn.Linear below `module` runs once per token; in_features, as a quantised weight has another shape."""
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(2.0 * part.in_features * part.out_features for part in linears)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _passed_flops(module: nn.Module, *, passes: bool) -> float:
    """Forward and backward of the linear maps below `module`, a row through each."""
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(2.0 * p.in_features * p.out_features * (1 + passes + p.weight.requires_grad) for p in linears)


def _expert_training_flops(layer: SparseMoE, *, passes: bool) -> float:
    """Forward and backward of router and experts, per token."""
    beside = [part for part in (layer.shared_expert, layer.residual_expert) if part is not None]
    router = 2.0 * layer.router.weight.numel() * (1 + passes + layer.router.weight.requires_grad)
    routed = layer.top_k * _row_flops(layer.experts) * (1 + passes + _trains(layer.experts))
    return routed + sum(_row_flops(p) * (1 + passes + _trains(p)) for p in beside) + router


def _head_sizes(config: Any) -> tuple[int, int]:
    """Widths of a head's keys and of its values; they differ in multi-head latent attention."""
    if getattr(config, "kv_lora_rank", None):
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size, size


def _mean_keys(length: int, window: int | None) -> float:
    """Keys that a token sees, its own included, as a mean over a causal sequence."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _window(config: Any, layer: int) -> int | None:
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _image_flops(vlm: VLM) -> float:
    if vlm.vision_encoder is None or vlm.connector is None:
        return 0.0
    return _encoder_flops(vlm.vision_encoder) + vlm.connector.num_tokens * _linear_flops(vlm.connector)


def _encoder_flops(encoder: VisionEncoder) -> float:
    """Patches, then blocks of linear maps and attention between all tokens, prefix tokens included."""
    vit = encoder.vit
    num_patches = vit.patch_embed.num_patches
    num_tokens = num_patches + vit.num_prefix_tokens
    blocks = sum(_linear_flops(block) for block in vit.blocks)
    attention = 4.0 * len(vit.blocks) * encoder.width * num_tokens
    return _patch_flops(encoder) + num_tokens * (blocks + attention)


def _patch_flops(encoder: VisionEncoder) -> float:
    return 2.0 * encoder.vit.patch_embed.num_patches * encoder.vit.patch_embed.proj.weight.numel()
