"""A decoder that is shown pictures in its own words, before it has eyes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moevlm.batch import DEFAULT_VIEW, VLMBatch
from moevlm.models.decoder import build_decoder
from moevlm.models.splicing import SplicedInputs
from moevlm.models.vlm import VLM


class PictureReader(VLM):
    """A decoder to which a picture is told patch by patch: a visual token is the sum of its words' embeddings (ours).

    ``visual_token = sum_w embedding(w) / sqrt(number of words)``. So the decoder learns, from text alone, what an image
    is to it later: a row of tokens in raster order that say many things at once. What is left to the connector is to
    turn features of patches into such sums. `VLMBatch.images` holds [N, P, W] int64 token ids, -1 where a patch has
    fewer than W words.
    """

    def __init__(self, language_model: PreTrainedModel, *, num_patches: int) -> None:
        super().__init__(None, None, language_model)
        self.num_patches = num_patches

    @property
    def num_visual_tokens(self) -> int:
        return self.num_patches

    def _splice(self, batch: VLMBatch, features: Tensor | None, view: str) -> SplicedInputs:
        inputs = super()._splice(batch, features, view)
        if batch.num_images == 0:
            return inputs
        words_NPW = batch.images[DEFAULT_VIEW]
        if words_NPW.shape[1] != self.num_patches:
            raise ValueError(
                f"a picture of {words_NPW.shape[1]} patches for a model of {self.num_patches}; set model.num_patches "
                "to the square of data.grid"
            )
        is_word_NPW1 = (words_NPW >= 0).unsqueeze(-1)
        words_NPWD = self.embed_tokens(words_NPW.clamp(min=0)) * is_word_NPW1
        visual_NPD = words_NPWD.sum(dim=2) / is_word_NPW1.sum(dim=2).clamp(min=1).sqrt()
        row_UD = inputs.inputs_embeds
        visual_VD = visual_NPD.flatten(0, 1).to(row_UD.dtype)
        return SplicedInputs(row_UD.index_copy(0, inputs.splice.visual_rows, visual_VD), inputs.splice)


def build_picture_reader(
    language_model: str | dict[str, Any], *, num_patches: int = 36, vocab_size: int | None = None, seed: int = 0
) -> PictureReader:
    """Build one; `language_model` as in `moevlm.models.build.build_vlm`. The random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = build_decoder(language_model, vocab_size=vocab_size)
    return PictureReader(decoder, num_patches=num_patches).train()  # type: ignore[no-any-return]
