"""The contract between datamodules and stages: what one micro-batch holds, what a model returns.

A micro-batch is *packed*: the tokens of all its sequences stand in one row, without padding, so that padding can
never reach a router. Two coordinate systems follow from splicing: *text coordinates* (``T`` below), where an image is
the one placeholder ``IMAGE_TOKEN_ID``, and *spliced coordinates* (``U``), where it is the model's visual tokens.
Batches live in text coordinates, because a teacher and its student may see another number of visual tokens;
`VLMOutput.text_positions` says where every text token went.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that no loss looks at."""

IMAGE_TOKEN_ID = -200
"""Placeholder of one image in `VLMBatch.input_ids`; never an id of a tokenizer."""

DEFAULT_VIEW = "default"
"""Key of `VLMBatch.images` for the student's image transform; a teacher's may stand beside it."""

TEACHER_VIEW = "teacher"
"""Key of `VLMBatch.images` for the teacher; absent when both models see the same."""

NO_PAIR = -1
"""`VLMBatch.pair_ids` of a sequence that belongs to no preference pair."""


class Segment(IntEnum):
    """What a token is part of."""

    IMAGE = 0
    SYSTEM = 1
    QUESTION = 2
    ANSWER = 3


@dataclass
class VLMBatch:
    """One micro-batch: B sequences of T text tokens in all, packed in one row, with N images.

    Python tuples hold what the host must know (shapes, splits), so that no step asks the device for it.
    """

    input_ids: Tensor  # [T] int64; IMAGE_TOKEN_ID stands for one image
    labels: Tensor  # [T] int64; the token's own id where it is supervised, else IGNORE_INDEX (not shifted)
    segments: Tensor  # [T] int64, values of Segment
    lengths: tuple[int, ...]  # [B] text tokens of each sequence, in order
    num_targets: int  # supervised tokens: (labels != IGNORE_INDEX).sum()
    image_sequences: tuple[int, ...]  # [N] the sequence of each image, in the order of the placeholders
    images: dict[str, Tensor]  # view -> [N, 3, H, W] float, normalised by that view's transform
    sources: Tensor  # [B] int64, index of the data source
    pair_ids: Tensor  # [B] int64; chosen and rejected of a pair share one id, NO_PAIR elsewhere
    is_chosen: Tensor  # [B] bool
    keys: tuple[str, ...] = ()  # [B] sample keys, for messages and analysis
    position: int = -1  # samples consumed before this global batch; -1 when unknown
    num_pairs: int = 0  # preference pairs; a pair is never split over micro-batches

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_images(self) -> int:
        return len(self.image_sequences)

    @property
    def num_text_tokens(self) -> int:
        """T: every image counts once."""
        return sum(self.lengths)

    def sequence_ids(self) -> Tensor:
        """[T] int64: the sequence of each text token."""
        lengths_B = torch.tensor(self.lengths, device=self.input_ids.device)
        ids_B = torch.arange(self.num_sequences, device=self.input_ids.device)
        return torch.repeat_interleave(ids_B, lengths_B, output_size=self.num_text_tokens)

    def view(self, name: str) -> Tensor:
        """The images as the named transform made them; a model without a view of its own sees the default one."""
        return self.images.get(name, self.images[DEFAULT_VIEW])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VLMBatch:
        """The same batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> VLMBatch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> VLMBatch:
        changes: dict[str, Any] = {"images": {name: function(tensor) for name, tensor in self.images.items()}}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changes[item.name] = function(value)
        return dataclasses.replace(self, **changes)


@dataclass
class Routing:
    """What one MoE layer decided for its T tokens."""

    router_logits: Tensor  # [T, E] float32
    router_probs: Tensor  # [T, E] float32; carries the gradient of balance losses
    expert_ids: Tensor  # [T, K] int64
    expert_weights: Tensor  # [T, K] float32; 0 where a choice was dropped
    dropped: Tensor | None = None  # [T, K] bool; None when nothing can be dropped


@dataclass
class Head:
    """A language-model head as losses and generation need it: ``logits = softcap(scale * (h @ weight.T + bias))``."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None  # c * tanh(logits / c), Gemma-2
    scale: float = 1.0

    def logits(self, hidden_states_RD: Tensor) -> Tensor:
        """[R, V] float32 logits of the given rows; meant for a gathered chunk of rows, never for a whole batch."""
        logits_RV = torch.nn.functional.linear(hidden_states_RD, self.weight, self.bias).float() * self.scale
        return logits_RV if self.softcap is None else self.softcap * torch.tanh(logits_RV / self.softcap)


@dataclass
class VLMOutput:
    """What a model returns: hidden states and routing records; losses and generation make logits of some rows."""

    hidden_states: Tensor  # [U, D] after the final norm, spliced coordinates
    text_positions: Tensor  # [T] int64: spliced row of each text token; an image placeholder: its first visual token
    segments: Tensor  # [U] int64, values of Segment
    sequence_ids: Tensor  # [U] int64
    lengths: tuple[int, ...]  # [B] spliced tokens of each sequence
    routings: Mapping[int, Routing] = field(default_factory=dict)  # by decoder layer index

    def prediction_rows(self, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `hidden_states` that predict the supervised tokens, and those tokens.

        Token t is predicted by the row before its own, so the first answer token is supervised like every other and an
        image between two text tokens is stepped over. A label on the first token of a sequence has no row and is
        refused by the collator.

        Returns:
            rows_R int64 and targets_R int64, R = number of labels other than IGNORE_INDEX.
        """
        supervised_R = torch.nonzero(labels_T != IGNORE_INDEX).squeeze(1)
        return self.text_positions[supervised_R] - 1, labels_T[supervised_R]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; text may hold ``<image>`` placeholders."""

    role: str  # "system", "user" or "assistant"
    text: str


@dataclass(frozen=True)
class Record:
    """One raw sample, as a shard holds it: nothing is decoded or tokenized yet."""

    key: str
    turns: tuple[Turn, ...]  # for a preference pair: the chosen conversation
    images: tuple[bytes, ...] = ()  # encoded image files, in the order of the placeholders
    rejected_turns: tuple[Turn, ...] | None = None  # preference pairs only
    metadata: Mapping[str, Any] = field(default_factory=dict)  # kind, benchmark, objects, scene ... as converted


@dataclass(frozen=True)
class EncodedSample:
    """One conversation, tokenized and with its images transformed; `preprocessing.collate.pack` puts it into a row."""

    key: str
    input_ids: Tensor  # [S] int64; one IMAGE_TOKEN_ID per image
    labels: Tensor  # [S] int64
    segments: Tensor  # [S] int64
    images: Mapping[str, Tensor] = field(default_factory=dict)  # view -> [n, 3, H, W]
    source: int = 0
    pair_id: int = NO_PAIR
    is_chosen: bool = False
