"""The contract between datamodules and stages: what one micro-batch holds, what a model returns.

A micro-batch is *packed*: the tokens of all its sequences stand in one row, without padding, so that padding can
never reach a router. Two coordinate systems follow from splicing: *text coordinates* (``T`` below), where an image is
the one placeholder ``IMAGE_TOKEN_ID``, and *spliced coordinates* (``U``), where it is the model's visual tokens.
Batches live in text coordinates, because a teacher and its student may see another number of visual tokens;
`VLMOutput.text_positions` says where every text token went.

Longer than a file should be: it is the one contract that every room reads, and is read as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Tiling:
    """How a picture of some size was cut into an overview and a grid of tiles (`moevlm.ops.tiling`)."""

    rows: int
    columns: int
    height: int  # of the picture, in pixels
    width: int

    @property
    def num_tiles(self) -> int:
        """The overview counted."""
        return 1 + self.rows * self.columns


@dataclass(frozen=True)
class PixelScale:
    """What an image transform makes of 8-bit levels: ``(level / 255 - mean) / std``, by channel.

    Batches carry levels, a quarter of the bytes; the model's device makes numbers of them.
    """

    mean: tuple[float, ...]  # [3]
    std: tuple[float, ...]  # [3]

    def normalise(self, levels_N3HW: Tensor) -> Tensor:
        """[..., 3, H, W] uint8 -> float32 of the same shape; the same bits on every device."""
        pixels_N3HW = levels_N3HW.to(torch.float32, memory_format=torch.contiguous_format)
        full, mean_311, std_311 = _constants(self, levels_N3HW.device)
        return pixels_N3HW.div_(full).sub_(mean_311).div_(std_311)


@functools.lru_cache(maxsize=64)
def _constants(scale: PixelScale, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255 as a tensor, too: a GPU would multiply by the rounded inverse of a number."""
    mean_311, std_311 = (torch.tensor(values, device=device).view(3, 1, 1) for values in (scale.mean, scale.std))
    return torch.tensor(255.0, device=device), mean_311, std_311


@dataclass
class CachedRows:
    """What a teacher said of R supervised tokens, as a cache keeps it; in the order of the labels.

    Formulas in `moevlm.losses.stored_rows`.
    """

    kind: str  # "top_k", "sampled" or "hidden"
    token_ids: Tensor | None = None  # [R, K] int64; top_k: most likely first
    values: Tensor | None = (
        None  # [R, K] float32; top_k: log-probabilities, sampled: weights, 0 where there is no token
    )
    tail_log_probs: Tensor | None = None  # [R] float32, of all other tokens together; top_k only
    entropies: Tensor | None = None  # [R] float32 nats, of the whole distribution; sampled only
    hidden_states: Tensor | None = None  # [R, D] after the final norm; hidden only

    def map(self, function: Callable[[Tensor], Tensor]) -> CachedRows:
        """The same rows with every tensor changed."""
        return _map_tensors(self, function)

    @staticmethod
    def concatenate(parts: Sequence[CachedRows]) -> CachedRows:
        """The rows of several samples; a sampled row is padded to the widest."""
        joined: dict[str, Any] = {}
        for item in dataclasses.fields(CachedRows):
            values = [getattr(part, item.name) for part in parts]
            if not isinstance(values[0], Tensor):
                joined[item.name] = values[0]
                continue
            if values[0].ndim == 2:
                widest = max(value.shape[1] for value in values)
                values = [torch.nn.functional.pad(value, (0, widest - value.shape[1])) for value in values]
            joined[item.name] = torch.cat(values)
        return CachedRows(**joined)


@dataclass
class AlignedSpans:
    """Stretches of supervised text that the student's and the teacher's tokenizer cut alike."""

    bounds: Tensor  # [K, 4] int64: first token and end in the student's row, first token and end in the teacher's


@dataclass(frozen=True)
class VocabularyMatch:
    """The tokens that two vocabularies have in common."""

    student_ids: Tensor  # [M] int64
    teacher_ids: Tensor  # [M] int64, of the same tokens

    def to(self, device: torch.device | str) -> VocabularyMatch:
        """The same match on another device."""
        return VocabularyMatch(self.student_ids.to(device), self.teacher_ids.to(device))


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
    images: dict[str, Tensor]  # view -> [N, 3, H, W] uint8 levels, or float without `scales`; tiled: [M, ...]
    sources: Tensor  # [B] int64, index of the data source
    pair_ids: Tensor  # [B] int64; chosen and rejected of a pair share one id, NO_PAIR elsewhere
    is_chosen: Tensor  # [B] bool
    keys: tuple[str, ...] = ()  # [B] sample keys, for messages and analysis
    position: int = -1  # samples consumed before this global batch; -1 when unknown
    num_pairs: int = 0  # preference pairs; a pair is never split over micro-batches
    tilings: dict[str, tuple[Tiling, ...]] = field(default_factory=dict)  # tiled views only: [N], M tiles in all
    cached_rows: CachedRows | None = None  # of the num_targets supervised tokens, when they come from a cache
    reference_log_probs: dict[str, Tensor] = field(default_factory=dict)  # reference -> [B] float32, from a cache
    teacher_batch: VLMBatch | None = None  # the same conversations in a teacher's own tokenizer
    spans: AlignedSpans | None = None  # where the two say the same; with `teacher_batch` only
    scales: dict[str, PixelScale] = field(default_factory=dict)  # of the views whose images are levels
    features: dict[str, Tensor] = field(default_factory=dict)  # view -> [M, P, width], of a frozen encoder's cache

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

    def targets_per_sequence(self) -> Tensor:
        """[B] int64: the supervised tokens of each sequence."""
        return torch.bincount(self.sequence_ids()[self.labels != IGNORE_INDEX], minlength=self.num_sequences)

    def view(self, name: str) -> Tensor:
        """[N, 3, H, W] float, normalised by the named transform; a model without a view of its own sees the default."""
        view = name if name in self.images else DEFAULT_VIEW
        if view not in self.images:
            raise ValueError(
                "the batch carries cached features and no pixels, and a model with a vision encoder of its own needs "
                "these; set data.vision_cache.pixels=true, or data.vision_cache.enabled=false"
            )
        pixels, scale = self.images[view], self.scales.get(view)
        return pixels if scale is None else scale.normalise(pixels)

    def view_tilings(self, name: str) -> tuple[Tiling, ...] | None:
        """[N] how that view's images are tiled; None for a view of one picture an image."""
        return tilings_of(self, name)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VLMBatch:
        """The same batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> VLMBatch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def select(self, rows: Sequence[int]) -> VLMBatch:
        """The micro-batch of the named sequences alone, in their order; at least one. A pair stays whole or goes."""
        if self.teacher_batch is not None:
            raise ValueError(
                "a micro-batch with a teacher of another tokenizer cannot be cut; give stage.build_teacher alone, or "
                "set data.cross_tokenizer=false"
            )
        starts = [sum(self.lengths[:row]) for row in range(len(self.lengths))]
        tokens = [t for row in rows for t in range(starts[row], starts[row] + self.lengths[row])]
        images = [n for row in rows for n, owner in enumerate(self.image_sequences) if owner == row]
        rows_B, tokens_T = _index(self.input_ids, rows), _index(self.input_ids, tokens)
        labels_T = self.labels[tokens_T]
        targets_T = (self.labels != IGNORE_INDEX).cumsum(0)[tokens_T] - 1
        targets_R = targets_T[labels_T != IGNORE_INDEX]
        pair_ids_B = self.pair_ids[rows_B]
        return VLMBatch(
            input_ids=self.input_ids[tokens_T],
            labels=labels_T,
            segments=self.segments[tokens_T],
            lengths=tuple(self.lengths[row] for row in rows),
            num_targets=int((labels_T != IGNORE_INDEX).sum()),
            image_sequences=tuple(n for n, row in enumerate(rows) for owner in self.image_sequences if owner == row),
            images={
                view: pixels[_index(self.input_ids, self._pictures(view, images))]
                for view, pixels in self.images.items()
            },
            sources=self.sources[rows_B],
            pair_ids=pair_ids_B,
            is_chosen=self.is_chosen[rows_B],
            keys=tuple(self.keys[row] for row in rows) if self.keys else (),
            position=self.position,
            num_pairs=int(((pair_ids_B != NO_PAIR) & self.is_chosen[rows_B]).sum()),
            tilings={view: tuple(tilings[n] for n in images) for view, tilings in self.tilings.items()},
            cached_rows=None if self.cached_rows is None else self.cached_rows.map(lambda value: value[targets_R]),
            reference_log_probs={name: value[rows_B] for name, value in self.reference_log_probs.items()},
            scales=self.scales,
            features={
                view: features[_index(self.input_ids, self._pictures(view, images))]
                for view, features in self.features.items()
            },
        )

    def _pictures(self, view: str, images: Sequence[int]) -> list[int]:
        """Rows of a view's pixels that belong to the named images."""
        if view not in self.tilings:
            return list(images)
        ends = list(itertools.accumulate(tiling.num_tiles for tiling in self.tilings[view]))
        return [row for n in images for row in range(ends[n] - self.tilings[view][n].num_tiles, ends[n])]

    def _map(self, function: Callable[[Tensor], Tensor]) -> VLMBatch:
        changed = _map_tensors(self, function)
        changed.images = {name: function(tensor) for name, tensor in self.images.items()}
        changed.features = {name: function(tensor) for name, tensor in self.features.items()}
        changed.reference_log_probs = {name: function(tensor) for name, tensor in self.reference_log_probs.items()}
        changed.cached_rows = None if self.cached_rows is None else self.cached_rows.map(function)
        changed.teacher_batch = None if self.teacher_batch is None else self.teacher_batch._map(function)
        changed.spans = None if self.spans is None else AlignedSpans(function(self.spans.bounds))
        return changed


def _map_tensors(item: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with its own tensors changed."""
    values = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    return dataclasses.replace(item, **{k: function(v) for k, v in values.items() if isinstance(v, Tensor)})


def _index(like: Tensor, numbers: Sequence[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64, device=like.device)


@dataclass
class Routing:
    """What one MoE layer decided for its T tokens."""

    router_logits: Tensor  # [T, E] float32
    router_probs: Tensor  # [T, E] float32; carries the gradient of balance losses
    expert_ids: Tensor  # [T, K] int64
    expert_weights: Tensor  # [T, K] float32; 0 where a choice was dropped
    dropped: Tensor | None = None  # [T, K] bool; None when nothing can be dropped
    num_balanced_choices: int | None = None  # leading choices that the balance loss counts; None: all K


@dataclass
class AttentionStates:
    """Queries and keys of one layer, after the rotary embedding: enough to make any block of its attention map."""

    query: Tensor  # [H, U, d]
    key: Tensor  # [Hk, U, d]; Hk divides H
    scaling: float  # of the scores
    softcap: float | None = None
    sliding_window: int | None = None


@dataclass
class Head:
    """A language-model head as losses and generation need it: ``logits = softcap(scale * (h @ weight.T + bias))``."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None  # c * tanh(logits / c), Gemma-2
    scale: float = 1.0

    def logits(self, hidden_states_RD: Tensor) -> Tensor:
        """[R, V] float32 logits of the given rows; meant for a gathered chunk of rows, never for a whole batch."""
        logits_RV = torch.nn.functional.linear(hidden_states_RD, self.weight, self.bias).float()
        logits_RV = logits_RV if self.scale == 1.0 else logits_RV * self.scale  # a copy saved, of what may be large
        return logits_RV if self.softcap is None else self.softcap * torch.tanh(logits_RV / self.softcap)

    def to(self, device: torch.device | str) -> Head:
        """The same head on another device."""
        return _map_tensors(self, lambda tensor: tensor.to(device))  # type: ignore[no-any-return]

    def cut(self, num_tokens: int) -> Head:
        """The head of the first `num_tokens` of the vocabulary; views, nothing is copied."""
        bias_V = None if self.bias is None else self.bias[:num_tokens]
        return dataclasses.replace(self, weight=self.weight[:num_tokens], bias=bias_V)


@dataclass
class VLMOutput:
    """What a model returns: hidden states and routing records; losses and generation make logits of some rows."""

    hidden_states: Tensor  # [U, D] after the final norm, spliced coordinates
    text_positions: Tensor  # [T] int64: spliced row of each text token; an image placeholder: its first visual token
    segments: Tensor  # [U] int64, values of Segment
    sequence_ids: Tensor  # [U] int64
    lengths: tuple[int, ...]  # [B] spliced tokens of each sequence
    routings: Mapping[int, Routing] = field(default_factory=dict)  # by decoder layer index
    visual_features: Tensor | None = None  # [N, P, width] before the connector, no gradient; None when blind
    layers: Mapping[int, Tensor] = field(default_factory=dict)  # [U, D] outputs of the decoder layers asked for
    attentions: Mapping[int, AttentionStates] = field(default_factory=dict)  # of the decoder layers asked for
    sources: Tensor | None = None  # [B] int64, the batch's: what a router of domains is taught
    domain_logits: Tensor | None = None  # [B, E] float32, of a router that chooses one whole-model expert a sequence

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
    images: Mapping[str, Tensor] = field(default_factory=dict)  # view -> [n, 3, H, W] as in VLMBatch; tiled: [m, ...]
    source: int = 0
    pair_id: int = NO_PAIR
    is_chosen: bool = False
    cached_rows: CachedRows | None = None
    reference_log_probs: Mapping[str, float] = field(default_factory=dict)
    teacher: EncodedSample | None = None  # the same conversation in a teacher's own tokenizer
    spans: Tensor | None = None  # [K, 4] int64, as in AlignedSpans, within the sample
    tilings: Mapping[str, Sequence[Tiling]] = field(default_factory=dict)  # tiled views only: [n], m tiles in all
    scales: Mapping[str, PixelScale] = field(default_factory=dict)  # of the views whose images are levels
    features: Mapping[str, Tensor] = field(default_factory=dict)  # as in VLMBatch; then pixels may be missing


def tilings_of(item: VLMBatch | EncodedSample, view: str) -> tuple[Tiling, ...] | None:
    """How the images that a model of this view sees are tiled; it falls back on the default view as `VLMBatch.view`."""
    found = item.tilings.get(view if view in item.images else DEFAULT_VIEW)
    return None if found is None else tuple(found)
