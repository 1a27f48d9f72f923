"""Whole-model experts: one decoder per domain behind a router that looks at the prompt.

Mixture of Modular Experts (arXiv:2407.19610), for vision-language models: vision encoder, connector, embeddings and
head are shared, each expert is a whole stack of decoder layers, and a sequence goes to one of them. Experts trained
apart and merged are the paper's PLE, trained together its JEET, and with a common expert that sees everything its
MoE-CE.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from moevlm.batch import DEFAULT_VIEW, Segment, VLMBatch, VLMOutput
from moevlm.models.attention import PackedSequences
from moevlm.models.decoder import decoder_layers
from moevlm.models.moe.router import Router
from moevlm.models.splicing import SplicedInputs
from moevlm.models.vlm import VLM


class ModularVLM(VLM):
    """A VLM whose decoder is one of several, chosen for each sequence.

    The first expert is `language_model`, which also owns the shared embeddings and head; the others are decoders
    without either. With a common expert, which runs on every sequence, the hidden states of both are averaged: behind
    a linear head that averages their logits, as in the paper. In training a sequence goes to the expert of its data
    source (source e to expert e), otherwise to the router's first choice.
    """

    def __init__(self, dense: VLM, *, num_experts: int, has_common: bool = False, seed: int = 0) -> None:
        """Take over the parts of a dense model, and make every expert a copy of its decoder.

        Args:
            dense: with gradient checkpointing as the experts shall have it.
            num_experts: without the common one.
            has_common: one more expert, for every sequence.
            seed: of the router.

        Raises:
            ValueError: fewer than two experts.
        """
        if num_experts < 2:
            raise ValueError(f"a modular model needs at least 2 experts, got {num_experts}; set model.num_experts")
        super().__init__(dense.vision_encoder, dense.connector, dense.language_model)
        self.num_experts, self.has_common = num_experts, has_common
        self.other_decoders = nn.ModuleList(
            _without_embeddings(self.language_model) for _ in range(num_experts - 1 + has_common)
        )
        self.domain_router = Router(self.language_model.config.hidden_size, num_experts, seed=seed)

    @property
    def decoders(self) -> list[nn.Module]:
        """The experts' decoders in order, the common one last."""
        return [self.language_model.get_decoder(), *self.other_decoders]

    @property
    def decoder_blocks(self) -> list[nn.Module]:
        layers = [list(_layers(decoder, self.language_model)) for decoder in self.other_decoders]
        return [*super().decoder_blocks, *(layer for of_expert in layers for layer in of_expert)]

    def forward(
        self,
        batch: VLMBatch,
        *,
        view: str = DEFAULT_VIEW,
        visual_features: Tensor | None = None,
        keep_layers: Sequence[int] = (),
        keep_attentions: Sequence[int] = (),
    ) -> VLMOutput:
        """Run one packed micro-batch; see `VLM.forward`. Every expert runs: one without a sequence gets the first.

        Raises:
            ValueError: layers to keep are asked for, or a source without an expert.
        """
        if keep_layers or keep_attentions:
            raise ValueError("whole-model experts have no layers in common; set stage terms on layers aside")
        self._check_context(batch, view)
        features = self._visual_features(batch, view) if visual_features is None else visual_features
        inputs = self._splice(batch, features, view)
        logits_BE = self.router_logits(inputs)
        choices = self._labels(batch) if self.training else logits_BE.argmax(dim=-1).tolist()
        hidden_UD = self._run_experts(inputs, choices)
        return self._output(hidden_UD, batch, inputs, features, domain_logits=logits_BE)

    def router_logits(self, inputs: SplicedInputs) -> Tensor:
        """[B, E] from the mean embedding of each sequence's prompt: a bag of words and patches.

        No gradient reaches the embeddings: the paper's router, too, is a classifier of its own, on word counts.
        """
        splice, width = inputs.splice, inputs.inputs_embeds.shape[-1]
        is_answer_U = (splice.segments == Segment.ANSWER).long()
        before_U = is_answer_U.cumsum(0) - is_answer_U
        lengths_B = torch.tensor(splice.lengths, device=is_answer_U.device)
        starts_B = lengths_B.cumsum(0) - lengths_B
        is_prompt_U = (before_U == before_U[starts_B][splice.sequence_ids]) & (is_answer_U == 0)
        weights_U = is_prompt_U.float()
        embeds_UD = inputs.inputs_embeds.detach().float() * weights_U[:, None]
        sums_BD = embeds_UD.new_zeros(len(splice.lengths), width).index_add(0, splice.sequence_ids, embeds_UD)
        counts_B = weights_U.new_zeros(len(splice.lengths)).index_add(0, splice.sequence_ids, weights_U)
        return self.domain_router(sums_BD / counts_B.clamp(min=1)[:, None])  # type: ignore[no-any-return]

    # generation

    def new_cache(self, inputs: SplicedInputs, size: tuple[int, int] | None = None) -> Any:
        choices = self.router_logits(inputs).argmax(dim=-1).tolist()
        return ModularCache(choices, [super(ModularVLM, self).new_cache(inputs, size) for _ in self.decoders])

    def decode(
        self,
        inputs_embeds: Tensor,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Any,
        token_mask: Tensor | None,
        position: Tensor | None = None,
    ) -> Tensor:
        """As `VLM.decode`, with a cache of `new_cache`; an expert runs on the rows that chose it. Not under FSDP2."""
        assert position is None, "which rows an expert runs on is the host's choice"
        assert isinstance(past_key_values, ModularCache), "a modular model decodes with a cache of new_cache"
        common = self.num_experts if self.has_common else -1
        hidden_BSD = torch.zeros_like(inputs_embeds)
        for number, decoder in enumerate(self.decoders):
            rows = [row for row, choice in enumerate(past_key_values.choices) if number in (choice, common)]
            if not rows:
                continue
            index = torch.tensor(rows, device=inputs_embeds.device)
            found = decoder(
                inputs_embeds=inputs_embeds[index],
                attention_mask=None if attention_mask is None else attention_mask[index],
                position_ids=position_ids[index],
                past_key_values=past_key_values.caches[number],
                use_cache=True,
            ).last_hidden_state
            hidden_BSD = hidden_BSD.index_add(0, index, found.to(hidden_BSD.dtype))
        return hidden_BSD / 2 if self.has_common else hidden_BSD

    # parts of the above

    def _labels(self, batch: VLMBatch) -> list[int]:
        labels = batch.sources.tolist()
        if max(labels) >= self.num_experts:
            raise ValueError(
                f"a sample of source {max(labels)}, the model has {self.num_experts} experts, one for each source; "
                "set model.num_experts or data.sources"
            )
        return [int(label) for label in labels]

    def _run_experts(self, inputs: SplicedInputs, choices: Sequence[int]) -> Tensor:
        splice, embeds_UD = inputs.splice, inputs.inputs_embeds
        ends = torch.tensor(splice.lengths).cumsum(0).tolist()
        everything = list(range(len(choices)))
        hidden_UD = torch.zeros_like(embeds_UD)
        for number, decoder in enumerate(self.decoders):
            is_common = self.has_common and number == self.num_experts
            rows = everything if is_common else [row for row in everything if choices[row] == number]
            is_own, rows = bool(rows), rows or [0]
            tokens = [t for row in rows for t in range(ends[row] - splice.lengths[row], ends[row])]
            index = torch.tensor(tokens, device=embeds_UD.device)
            lengths = tuple(splice.lengths[row] for row in rows)
            packed = PackedSequences(lengths, embeds_UD.device, kernel=self.attention)
            found = self._run_packed(decoder, embeds_UD[index], splice.position_ids[index], packed)
            hidden_UD = hidden_UD.index_add(0, index, found if is_own else found * 0)
        return hidden_UD / 2 if self.has_common else hidden_UD


class ModularCache:
    """One key-value cache for each expert, of the rows that chose it."""

    def __init__(self, choices: Sequence[int], caches: Sequence[Cache]) -> None:
        self.choices = list(choices)  # [B] the expert of each row
        self.caches = list(caches)


def _without_embeddings(language_model: PreTrainedModel) -> nn.Module:
    """A copy of the decoder whose embeddings are left to the owner of the shared ones."""
    decoder = language_model.get_decoder()
    embeddings = decoder.get_input_embeddings()
    decoder.set_input_embeddings(nn.Identity())
    try:
        return copy.deepcopy(decoder)
    finally:
        decoder.set_input_embeddings(embeddings)


def _layers(decoder: nn.Module, language_model: PreTrainedModel) -> nn.ModuleList:
    """The layers of another expert, which stand where the first one's do."""
    first = decoder_layers(language_model)
    names = [name for name, module in language_model.get_decoder().named_modules() if module is first]
    found = decoder.get_submodule(names[0])
    assert isinstance(found, nn.ModuleList)
    return found
