"""The vision-language model: encoder, connector, decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from moevlm.batch import DEFAULT_VIEW, IMAGE_TOKEN_ID, EncodedSample, Head, VLMBatch, VLMOutput, tilings_of
from moevlm.models.adapter_settings import LoRASettings
from moevlm.models.attention import PackedSequences
from moevlm.models.connector import Connector
from moevlm.models.decoder import context_length, decoder_layers, language_model_head
from moevlm.models.execution import checkpoint_function, checkpoint_policies, compile_layers
from moevlm.models.key_value_cache import FixedCache
from moevlm.models.moe.moe_layer import SparseMoE
from moevlm.models.moe.recorder import RoutingRecorder
from moevlm.models.splicing import SplicedInputs, make_splice, spliced_lengths
from moevlm.models.vision_encoder import VisionEncoder
from moevlm.ops.tiling import num_tiled_tokens, tiled_token_index


class VLM(nn.Module):
    """Visual tokens spliced into the text, one decoder over both (LLaVA, arXiv:2304.08485).

    Without a vision encoder the model is *blind*: images are ignored and each placeholder is read as one neutral text
    token (the decoder's own begin- or end-of-text), so that the token after it still has a row that predicts it.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder | None,
        connector: Connector | None,
        language_model: PreTrainedModel,
        *,
        gradient_checkpointing: bool | str | Sequence[str] = False,
    ) -> None:
        """Join the parts; `gradient_checkpointing` is described in `moevlm.models.execution`."""
        super().__init__()
        if (vision_encoder is None) != (connector is None):
            raise ValueError("a vision encoder and a connector come together or not at all; set model.vision_encoder")
        self.vision_encoder = vision_encoder
        self.connector = connector
        self.language_model = language_model
        self.recorder = RoutingRecorder()
        self.lora: LoRASettings | None = None  # set by `add_lora`, unset by `merge_lora`
        self.attention = "auto"  # one of `moevlm.models.varlen.KERNELS`
        self._checkpoint(gradient_checkpointing)

    def compile_layers(self) -> None:
        """Compile the decoder's layers and the vision encoder's blocks (`moevlm.models.execution`)."""
        compile_layers(self.decoder_blocks)
        if self.vision_encoder is not None:
            compile_layers(list(self.vision_encoder.vit.blocks))

    # what it is made of

    @property
    def num_visual_tokens(self) -> int:
        """Spliced tokens per picture: of an image, or of its overview and each tile; 1 for a blind model."""
        return 1 if self.connector is None else self.connector.num_tokens

    def visual_token_counts(self, item: VLMBatch | EncodedSample, num_images: int, view: str) -> tuple[int, ...]:
        """[N] spliced tokens of each image; host arithmetic only.

        Raises:
            ValueError: tiled images, but a connector that cannot join them.
        """
        tilings = tilings_of(item, view)
        if self.connector is None or tilings is None:
            return (self.num_visual_tokens,) * num_images
        if self.connector.image_newline is None:
            raise ValueError(
                f"the images are tiled, connector {self.connector.kind!r} cannot join tiles; set model.connector="
                f"anyres_{self.connector.kind}, or another processor.image.mode"
            )
        return tuple(num_tiled_tokens(tiling, side=self.connector.side) for tiling in tilings)

    @property
    def decoder_blocks(self) -> list[nn.Module]:
        """The decoder layers, of every expert where a model has several decoders."""
        return list(decoder_layers(self.language_model))

    @property
    def moe_layers(self) -> dict[int, SparseMoE]:
        """The MoE layers by decoder layer index."""
        layers = decoder_layers(self.language_model)
        return {index: layer.mlp for index, layer in enumerate(layers) if isinstance(layer.mlp, SparseMoE)}

    @property
    def moe(self) -> dict[str, Any] | None:
        """What `upcycle` needs to make these MoE layers; None for a dense model."""
        layers = self.moe_layers
        if not layers:
            return None
        settings = next(iter(layers.values())).settings.as_dict()
        return {**settings, "num_experts": [layer.num_experts for layer in layers.values()], "placement": list(layers)}

    @property
    def head(self) -> Head:
        """The vocabulary projection. Read it anew after each forward: under FSDP2 the weights are whole only then."""
        return language_model_head(self.language_model)

    def sequence_lengths(self, batch: VLMBatch, view: str = DEFAULT_VIEW) -> tuple[int, ...]:
        """[B] tokens of each sequence as this model sees it, visual tokens included; host arithmetic only."""
        return spliced_lengths(batch, self.visual_token_counts(batch, batch.num_images, view))

    def count_tokens(self, batch: VLMBatch, view: str = DEFAULT_VIEW) -> int:
        """U: tokens of the batch as this model sees it; host arithmetic only."""
        return sum(self.sequence_lengths(batch, view))

    # packed: training and scoring

    def forward(
        self,
        batch: VLMBatch,
        *,
        view: str = DEFAULT_VIEW,
        visual_features: Tensor | None = None,
        keep_layers: Sequence[int] = (),
        keep_attentions: Sequence[int] = (),
    ) -> VLMOutput:
        """Run one packed micro-batch.

        Args:
            batch: text coordinates; every image as the one placeholder.
            view: whose image transform; falls back on the default view.
            visual_features: [N, P, width] of another model's equal vision encoder, `VLMOutput.visual_features`; the
                own encoder then does not run.
            keep_layers: decoder layers whose outputs come with the output, with their gradient.
            keep_attentions: decoder layers whose queries and keys do.

        Raises:
            ValueError: a layer that does not exist, a sequence longer than the decoder's context, or images that do not
                match the placeholders.
        """
        self._check_context(batch, view)
        features = self._visual_features(batch, view) if visual_features is None else visual_features
        inputs = self._splice(batch, features, view)
        splice = inputs.splice
        keep = self._check_layers(keep_attentions)
        packed = PackedSequences(splice.lengths, splice.position_ids.device, keep, kernel=self.attention)
        with self.recorder.open() as routings, self._record(self._check_layers(keep_layers)) as layers:
            decoder = self.language_model.get_decoder()
            hidden_UD = self._run_packed(decoder, inputs.inputs_embeds, splice.position_ids, packed)
        # a copy, as FSDP2 hangs its backward hook on the output and warns about views
        kept: dict[str, Any] = {"routings": routings, "layers": layers, "attentions": packed.kept}
        output = self._output(hidden_UD.clone(), batch, inputs, features, **kept)
        self._check_routings(output)
        return output

    def embed(self, batch: VLMBatch, view: str = DEFAULT_VIEW) -> SplicedInputs:
        """The batch as the decoder sees it; generation prefills from this."""
        return self._splice(batch, self._visual_features(batch, view), view)

    def new_cache(self, inputs: SplicedInputs, size: tuple[int, int] | None = None) -> Any:
        """An empty key-value cache for `decode` of these inputs.

        Args:
            size: rows and columns of a cache of fixed size; None for one that grows.
        """
        if size is None:
            return DynamicCache()
        num_layers = self.language_model.config.num_hidden_layers
        return FixedCache(num_layers, batch_size=size[0], max_length=size[1])

    def decode(
        self,
        inputs_embeds: Tensor,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Cache | None,
        token_mask: Tensor | None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Run the decoder on padded input with a key-value cache.

        Args:
            inputs_embeds: [B, S, D].
            attention_mask: [B, 1, S, S_total] bool, True attends; None is plain causal.
            position_ids: [B, S], counted without padding.
            past_key_values: a transformers Cache, extended in place; None for no cache.
            token_mask: [B, S] bool, True for real tokens: padding never reaches a router. None: all are real.
            position: [1] int64, to what the cache is pinned: the column of the one new token. The mask then spans the
                whole cache, and nothing of the call depends on the host.

        Returns:
            [B, S, D] hidden states after the final norm.
        """
        is_static = position is not None
        with self.recorder.open(token_mask=token_mask, static=is_static):
            output = self.language_model.get_decoder()(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                **({"query_position": position} if is_static else {}),
            )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """[...] token ids -> [..., D]."""
        return self.language_model.get_input_embeddings()(token_ids)  # type: ignore[no-any-return]

    # parts of the above

    def _run_packed(
        self, decoder: nn.Module, embeds_UD: Tensor, position_ids_U: Tensor, packed: PackedSequences
    ) -> Tensor:
        """[U, D] last states of one packed row."""
        # what this flag says is that keyword arguments reach the attention function
        hands_down = getattr(self.language_model, "_supports_attention_backend", False)
        hidden_1UD = decoder(
            inputs_embeds=embeds_UD.unsqueeze(0),
            attention_mask=None if hands_down else packed.as_mask(),
            position_ids=position_ids_U.unsqueeze(0),
            use_cache=False,
            packed_sequences=packed,
        ).last_hidden_state
        assert packed.reached_attention, "sequences were mixed: attention was not told where they end"
        return hidden_1UD.squeeze(0)  # type: ignore[no-any-return]

    def _output(
        self, hidden_UD: Tensor, batch: VLMBatch, inputs: SplicedInputs, features: Tensor | None, **more: Any
    ) -> VLMOutput:
        """The states with what says which row is what."""
        splice = inputs.splice
        return VLMOutput(
            hidden_UD,
            splice.text_positions,
            splice.segments,
            splice.sequence_ids,
            splice.lengths,
            visual_features=None if features is None else features.detach(),
            sources=batch.sources,
            **more,
        )

    def _checkpoint(self, setting: bool | str | Sequence[str]) -> None:
        layers: Any = decoder_layers(self.language_model)
        policies = checkpoint_policies(setting, len(layers))
        if set(policies) == {"off"}:
            return
        # newer transformers renamed the method, which also refuses decoders that cannot be checkpointed
        enable = getattr(self.language_model, "activation_checkpointing_enable", None)
        (enable or self.language_model.gradient_checkpointing_enable)({"use_reentrant": False})
        for layer, policy in zip(layers, policies):
            layer.gradient_checkpointing = policy != "off"
            layer._gradient_checkpointing_func = checkpoint_function(policy)
        if self.vision_encoder is not None:
            self.vision_encoder.gradient_checkpointing = True

    def _splice(self, batch: VLMBatch, features: Tensor | None, view: str) -> SplicedInputs:
        splice = make_splice(batch, self.visual_token_counts(batch, batch.num_images, view))
        is_image_T = batch.input_ids == IMAGE_TOKEN_ID
        text_TD = self.embed_tokens(batch.input_ids.masked_fill(is_image_T, self._neutral_token_id))
        row_UD = text_TD.index_select(0, splice.text_tokens)
        if features is None or self.connector is None:
            return SplicedInputs(row_UD, splice)
        tilings = batch.view_tilings(view) or None  # none without images
        index_V = None if tilings is None else tiled_token_index(tilings, side=self.connector.side).to(row_UD.device)
        visual = self.connector(features.to(next(self.connector.parameters()).dtype), index_V).to(row_UD.dtype)
        if batch.num_images == 0:
            return SplicedInputs(row_UD + visual.sum() * 0, splice)
        visual_VD = visual.flatten(0, -2)
        return SplicedInputs(row_UD.index_copy(0, splice.visual_rows, visual_VD), splice)

    def _visual_features(self, batch: VLMBatch, view: str) -> Tensor | None:
        """[N, P, width]. Without images one zero image runs all the same: under FSDP2 every rank runs every module."""
        if self.vision_encoder is None:
            return None
        tilings = batch.view_tilings(view)
        pictures = batch.num_images if tilings is None else sum(tiling.num_tiles for tiling in tilings)
        if view in batch.features:
            return self._stored_features(batch, batch.features[view], pictures)
        if batch.num_images == 0:
            size = self.vision_encoder.image_size
            images_N3HW = torch.zeros(1, 3, size, size, device=batch.input_ids.device)
        else:
            images_N3HW = batch.view(view)
            if images_N3HW.shape[0] != pictures:
                what = f"{batch.num_images} placeholders" if tilings is None else f"{pictures} tiles"
                raise ValueError(f"{images_N3HW.shape[0]} images for {what} in batch {batch.keys}")
        trains = any(parameter.requires_grad for parameter in self.vision_encoder.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return self.vision_encoder(images_N3HW)  # type: ignore[no-any-return]

    def _stored_features(self, batch: VLMBatch, features_MPD: Tensor, pictures: int) -> Tensor:
        """Of a cache; `VLMStage` has compared its encoder with this one. Zeros stand for the zero image of above."""
        assert self.vision_encoder is not None
        size = (self.vision_encoder.num_tokens, self.vision_encoder.width)
        if features_MPD.shape != (pictures, *size):
            raise ValueError(
                f"cached features of {tuple(features_MPD.shape)} for {pictures} pictures of {size} in batch "
                f"{batch.keys}; run experiments.cache_vision again"
            )
        return features_MPD if pictures else features_MPD.new_zeros(1, *size)

    @property
    def _neutral_token_id(self) -> int:
        config = self.language_model.config
        for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
            token_id = value[0] if isinstance(value, list) and value else value
            if isinstance(token_id, int) and 0 <= token_id < config.vocab_size:
                return token_id
        return 0

    @contextlib.contextmanager
    def _record(self, indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collects the outputs of the decoder layers named, of the calls made inside alone."""
        states: dict[int, Tensor] = {}

        def keep(index: int, output: Any) -> None:
            states[index] = (output[0] if isinstance(output, tuple) else output).squeeze(0)

        layers: Any = decoder_layers(self.language_model) if indices else []
        handles = [
            layers[index].register_forward_hook(lambda _, __, output, index=index: keep(index, output))
            for index in indices
        ]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def _check_layers(self, indices: Sequence[int]) -> Sequence[int]:
        num_layers = self.language_model.config.num_hidden_layers
        beyond = [index for index in indices if not 0 <= index < num_layers]
        if beyond:
            raise ValueError(f"the language model has layers 0 to {num_layers - 1}, asked for {beyond}")
        return indices

    def _check_context(self, batch: VLMBatch, view: str) -> None:
        limit = context_length(self.language_model.config)
        lengths = self.sequence_lengths(batch, view)
        if limit is not None and max(lengths) > limit:
            row = lengths.index(max(lengths))
            name = batch.keys[row] if batch.keys else f"sequence {row}"
            raise ValueError(
                f"{name} has {lengths[row]} tokens with its images, the language model's context is {limit}; "
                "set data.max_length, or choose a connector with fewer visual tokens"
            )

    def _check_routings(self, output: VLMOutput) -> None:
        layers = self.moe_layers
        assert output.routings.keys() == layers.keys(), f"records {list(output.routings)}, MoE layers {list(layers)}"
        if not torch.is_grad_enabled():
            return
        for index, routing in output.routings.items():
            if layers[index].router.weight.requires_grad and not routing.router_probs.requires_grad:
                raise RuntimeError(
                    f"the routing record of layer {index} lost its gradient; reentrant activation checkpointing does "
                    "this, use VLM(gradient_checkpointing=True)"
                )
