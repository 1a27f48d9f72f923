"""One decode step of a plain pre-norm decoder with few kernels a layer, on the weights of its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moevlm.models.decoder import decoder_layers
from moevlm.models.key_value_cache import FixedCache
from moevlm.models.moe.experts import StackedExperts, ffn_projections, is_silu
from moevlm.models.moe.moe_layer import SparseMoE
from moevlm.models.vlm import VLM
from moevlm.ops.decode import MAX_ROWS, Choices, gated_ffn, linear, route
from moevlm.ops.decode_attention import HEAD_WIDTHS, attend

FUSED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Decoders whose layer is ``x += attention(norm(x)); x += ffn(norm(x))`` and nothing else, with rotary positions."""


@dataclass
class _Layer:
    attention: Any
    sizes: tuple[int, int]  # heads, key heads
    norms: tuple[Any, Any]  # before attention, before the feed-forward network
    moe: SparseMoE | None
    ffn: tuple[Tensor, Tensor, Tensor]  # gate, up, down; [E, out, in]


class FusedStep:
    """Token ids to logits through kernels that read every weight once; the weights stay the model's own.

    Equals `VLM.decode` and the head, up to rounding: a norm is applied behind the product it precedes.
    """

    def __init__(self, vlm: VLM, cache: FixedCache, starts_B: Tensor, position: Tensor) -> None:
        """Bind a step to its memory.

        Args:
            cache: filled by a prefill.
            starts_B: first real column of each row.
            position: [1] column of the new tokens.
        """
        assert (reason := why_not_fused(vlm, cache.num_rows)) is None, reason
        self.cache, self.starts_B, self.position = cache, starts_B, position
        self.decoder: Any = vlm.language_model.get_decoder()
        self.embeddings, self.head = vlm.language_model.get_input_embeddings(), vlm.head
        self.layers = [_describe(layer) for layer in decoder_layers(vlm.language_model)]
        places_1L = torch.arange(cache.num_columns, device=position.device)[None]
        like = self.head.weight.new_zeros(1, 1, 1)
        self.cos_Ld, self.sin_Ld = (table[0].contiguous() for table in self.decoder.rotary_emb(like, places_1L))

    def __call__(self, token_B: Tensor, running_B: Tensor) -> Tensor:
        """[B, V] float32 logits behind the new tokens."""
        x_BD = self.embeddings(token_B)
        for index, layer in enumerate(self.layers):
            x_BD = self._attend(index, layer, x_BD)
            x_BD = self._feed_forward(layer, x_BD, running_B)
        norm = self.decoder.norm
        options = {"norm_D": norm.weight, "eps": norm.variance_epsilon, "dtype": torch.float32}
        return linear(x_BD, [self.head.weight], [self.head.bias], **options)

    def _attend(self, index: int, layer: _Layer, x_BD: Tensor) -> Tensor:
        part, norm = layer.attention, layer.norms[0]
        maps = (part.q_proj, part.k_proj, part.v_proj)
        qkv_BN = linear(
            x_BD,
            [one.weight for one in maps],
            [one.bias for one in maps],
            norm_D=norm.weight,
            eps=norm.variance_epsilon,
        )
        stored = self.cache.fixed_layers[index]
        assert stored.keys is not None, "a fused step follows a prefill"
        assert stored.values is not None
        query_norm, key_norm = getattr(part, "q_norm", None), getattr(part, "k_norm", None)
        mixed_BN = attend(
            qkv_BN,
            stored.keys,
            stored.values,
            self.starts_B,
            self.position,
            cos_Ld=self.cos_Ld,
            sin_Ld=self.sin_Ld,
            num_heads=layer.sizes[0],
            scaling=part.scaling,
            window=_window(part),
            query_norm_d=None if query_norm is None else query_norm.weight,
            key_norm_d=None if key_norm is None else key_norm.weight,
            eps=0.0 if query_norm is None else query_norm.variance_epsilon,
        )
        return linear(mixed_BN, [part.o_proj.weight], [part.o_proj.bias], residual_BN=x_BD)

    def _feed_forward(self, layer: _Layer, x_BD: Tensor, running_B: Tensor) -> Tensor:
        norm, choices = layer.norms[1], None
        options = {"norm_D": norm.weight, "eps": norm.variance_epsilon}
        if layer.moe is not None:
            choices = _choose(layer.moe, x_BD, running_B, options)
        return gated_ffn(x_BD, *layer.ffn, choices, residual_BD=x_BD, **options)


def _choose(moe: SparseMoE, x_BD: Tensor, running_B: Tensor, norm: dict[str, Any]) -> Choices:
    settings = moe.settings
    return route(
        x_BD,
        moe.router.weight,
        running_B,
        top_k=settings.top_k,
        score=settings.score,
        normalise=settings.normalises,
        weight_scale=settings.weight_scale,
        selection_bias_E=moe.router.selection_bias,
        **norm,
    )


def _window(attention: Any) -> int | None:
    """Of one layer; Mistral keeps it in the config, Qwen in the layers that have one."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    return getattr(attention.config, "sliding_window", None)


def why_not_fused(vlm: VLM, batch_size: int) -> str | None:
    """What keeps `FusedStep` from this model, in words; None when it fits."""
    config = vlm.language_model.config
    if type(vlm) is not VLM:
        return "whole-model experts are chosen by the host"
    if config.model_type not in FUSED_FAMILIES:
        return f"{config.model_type} is none of {', '.join(FUSED_FAMILIES)}"
    if batch_size > MAX_ROWS:
        return f"{batch_size} rows, it takes {MAX_ROWS}"
    floats = {parameter.dtype for parameter in vlm.language_model.parameters() if parameter.dim() > 1}
    routers = {layer.router.weight.dtype for layer in vlm.moe_layers.values()}
    if len(floats - (routers if len(floats) > 1 else set())) != 1:
        return f"weights of several dtypes: {', '.join(sorted(map(str, floats)))}"
    reasons = (_why_not_layer(layer) for layer in decoder_layers(vlm.language_model))
    return next((reason for reason in reasons if reason is not None), None)


def _why_not_layer(layer: Any) -> str | None:
    part = layer.self_attn
    if any(type(one) is not nn.Linear for one in (part.q_proj, part.k_proj, part.v_proj, part.o_proj)):
        return "attention has adapters or quantized weights"
    if part.head_dim not in HEAD_WIDTHS:
        return f"heads of width {part.head_dim}; known: {', '.join(map(str, HEAD_WIDTHS))}"
    if isinstance(layer.mlp, SparseMoE):
        plain = layer.mlp.shared_expert is None and layer.mlp.residual_expert is None
        experts = layer.mlp.experts
        fits = plain and layer.mlp.can_be_static and isinstance(experts, StackedExperts) and experts.is_swiglu
        return None if fits else "a MoE layer that drops tokens, or has other experts than routed SwiGLU ones"
    linears = [child for child in layer.mlp.children() if isinstance(child, nn.Linear)]
    is_plain = len(linears) == 3 and all(type(one) is nn.Linear and one.bias is None for one in linears)
    return None if is_plain and is_silu(layer.mlp.act_fn) else "a feed-forward network other than a plain SwiGLU"


def _describe(layer: Any) -> _Layer:
    part, head = layer.self_attn, layer.self_attn.head_dim
    moe = layer.mlp if isinstance(layer.mlp, SparseMoE) else None
    if moe is None:
        gate, up, down = (projection.weight[None] for projection in ffn_projections(layer.mlp))
    else:
        gate, up, down = moe.experts.parameters()
    sizes = (part.q_proj.out_features // head, part.k_proj.out_features // head)
    return _Layer(part, sizes, (layer.input_layernorm, layer.post_attention_layernorm), moe, (gate, up, down))
