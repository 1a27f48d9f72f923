"""What a training step should take of a GPU's memory, written down before it is measured.

For a dense or sparse decoder with SwiGLU networks, compiled or with custom backwards, that keeps every activation:
float32 parameters and gradients, AdamW's two float32 moments, and per token and layer in bfloat16

======================================  =====================================================================
kept for the backward pass              numbers per token
======================================  =====================================================================
residual stream, before each norm       2 D
normed input of attention               D
queries, keys, values, attention        D + 2 D_kv + D
normed input of the feed-forward        D
gate and up                             2 F, for each of the K experts a token meets
their product                           F, likewise (it is the input of the last map)
permuted rows of an MoE layer           2 K D: what enters and what leaves the experts
======================================  =====================================================================

Beside these the two buffers of logits, the bfloat16 copies that autocast makes of the layers' weights while a
micro-batch runs, and one picture batch inside a vision block.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moevlm.losses.fused import LOGITS_BYTES
from moevlm.models.decoder import decoder_layers
from moevlm.models.vlm import VLM

HALF, SINGLE = 2, 4  # bytes of bfloat16 and float32


def predicted_bytes(vlm: VLM, lengths: Sequence[int], num_targets: int, num_images: int) -> dict[str, float]:
    """Peak of a step by part, of the largest micro-batch.

    Args:
        vlm: already frozen; its parameters may be on the meta device.
        lengths: [B] tokens of each sequence, visual ones included.
        num_targets: supervised tokens.
        num_images: pictures.
    """
    config, num_tokens = vlm.language_model.config, sum(lengths)
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    key_values = width * config.num_key_value_heads // heads
    trained = sum(parameter.numel() for parameter in vlm.parameters() if parameter.requires_grad)
    per_layer, moe = 2 * width + width + 2 * width + 2 * key_values + width, vlm.moe_layers
    numbers = 0
    for index in range(config.num_hidden_layers):
        choices = moe[index].top_k if index in moe else 1
        numbers += per_layer + 3 * inner * choices + (2 * choices * width if index in moe else 0)
    weights = sum(_numel(layer) for layer in decoder_layers(vlm.language_model))
    pictures = 0
    if vlm.vision_encoder is not None:
        pictures = num_images * (vlm.vision_encoder.num_tokens + 1) * vlm.vision_encoder.width * (4 + 4 + 4)
    return {
        "parameters": float(SINGLE * _numel(vlm)),
        "gradients": float(SINGLE * trained),
        "moments": float(2 * SINGLE * trained),
        "activations": float(HALF * numbers * num_tokens),
        "weights in bfloat16": float(HALF * weights),
        "logits and head": float(LOGITS_BYTES + 2 * HALF * num_targets * width),
        "pictures": float(HALF * pictures),
    }


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
