"""From text coordinates to spliced coordinates: every image placeholder becomes the image's visual tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from moevlm.batch import IMAGE_TOKEN_ID, VLMBatch


@dataclass
class Splice:
    """Where everything of a batch goes; index tensors only, no embeddings."""

    lengths: tuple[int, ...]  # [B] spliced tokens of each sequence
    text_positions: Tensor  # [T] int64, as in VLMOutput
    text_tokens: Tensor  # [U] int64, the text token that each spliced row comes from
    position_ids: Tensor  # [U] int64, counted within the sequence
    segments: Tensor  # [U] int64, values of Segment
    sequence_ids: Tensor  # [U] int64
    visual_rows: Tensor  # [N * P] int64, rows of the visual tokens, image by image


@dataclass
class SplicedInputs:
    """A batch as the decoder sees it, in one packed row."""

    inputs_embeds: Tensor  # [U, D]
    splice: Splice


def spliced_lengths(batch: VLMBatch, *, num_visual_tokens: int) -> tuple[int, ...]:
    """[B] tokens of each sequence once its images are spliced in; host arithmetic only."""
    images = Counter(batch.image_sequences)
    return tuple(length + images[row] * (num_visual_tokens - 1) for row, length in enumerate(batch.lengths))


def make_splice(batch: VLMBatch, *, num_visual_tokens: int) -> Splice:
    """Work out the spliced row. Shapes come from the batch's tuples, so the device is never asked for them."""
    lengths = spliced_lengths(batch, num_visual_tokens=num_visual_tokens)
    device = batch.input_ids.device
    total = sum(lengths)
    is_image_T = batch.input_ids == IMAGE_TOKEN_ID
    sizes_T = torch.where(is_image_T, num_visual_tokens, 1)
    text_positions_T = sizes_T.cumsum(0) - sizes_T
    text_tokens_U = torch.arange(batch.num_text_tokens, device=device).repeat_interleave(sizes_T, output_size=total)
    lengths_B = torch.tensor(lengths, device=device)
    sequence_ids_U = torch.arange(len(lengths), device=device).repeat_interleave(lengths_B, output_size=total)
    starts_B = lengths_B.cumsum(0) - lengths_B
    images_N = torch.nonzero_static(is_image_T, size=batch.num_images).squeeze(1)
    visual_rows_NP = text_positions_T[images_N, None] + torch.arange(num_visual_tokens, device=device)
    return Splice(
        lengths=lengths,
        text_positions=text_positions_T,
        text_tokens=text_tokens_U,
        position_ids=torch.arange(total, device=device) - starts_B[sequence_ids_U],
        segments=batch.segments[text_tokens_U],
        sequence_ids=sequence_ids_U,
        visual_rows=visual_rows_NP.flatten(),
    )
