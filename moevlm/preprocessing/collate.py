"""Encoded samples to one packed row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moevlm.batch import (
    DEFAULT_VIEW,
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    NO_PAIR,
    AlignedSpans,
    CachedRows,
    EncodedSample,
    PixelScale,
    Tiling,
    VLMBatch,
)


def pack(samples: Sequence[EncodedSample], position: int = -1) -> VLMBatch:
    """One micro-batch from its samples, in order, without padding.

    Args:
        samples: at least one; chosen and rejected of a pair share a `pair_id` and are both among them.
        position: samples consumed before the global batch that this is part of.

    Raises:
        ValueError: no samples, an empty sample, a label on a first token (no row predicts it), labels or segments of
            another length, images that disagree with the placeholders, a pair that is not one chosen and one rejected.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample; set micro_batch_size to 1 or more")
    input_ids_T = torch.cat([sample.input_ids for sample in samples])
    labels_T = torch.cat([sample.labels for sample in samples])
    segments_T = torch.cat([sample.segments for sample in samples])
    counts = _check(samples, input_ids_T, labels_T)
    image_sequences = tuple(row for row, count in enumerate(counts) for _ in range(count))
    return VLMBatch(
        input_ids=input_ids_T,
        labels=labels_T,
        segments=segments_T,
        lengths=tuple(len(sample.input_ids) for sample in samples),
        num_targets=int((labels_T != IGNORE_INDEX).sum()),
        image_sequences=image_sequences,
        images=_merge_views(samples, len(image_sequences)),
        sources=torch.tensor([sample.source for sample in samples]),
        pair_ids=torch.tensor([sample.pair_id for sample in samples]),
        is_chosen=torch.tensor([sample.is_chosen for sample in samples]),
        keys=tuple(sample.key for sample in samples),
        position=position,
        num_pairs=_count_pairs(samples),
        tilings=_merge_tilings(samples),
        scales=_merge_scales(samples),
        features=_merge_features(samples),
        cached_rows=_merge_cached_rows(samples),
        reference_log_probs={
            name: torch.tensor([sample.reference_log_probs[name] for sample in samples])
            for name in samples[0].reference_log_probs
        },
        **_merge_teacher_side(samples, position),
    )


def _check(samples: Sequence[EncodedSample], input_ids_T: Tensor, labels_T: Tensor) -> list[int]:
    """Images of each sample. The tokens are looked at in one go: a tensor operation takes longer than its work here."""
    lengths = [len(sample.input_ids) for sample in samples]
    for sample, length in zip(samples, lengths):
        if length == 0:
            raise ValueError(f"sample {sample.key} is empty")
        if len(sample.labels) != length or len(sample.segments) != length:
            raise ValueError(
                f"sample {sample.key}: {length} tokens, {len(sample.labels)} labels, {len(sample.segments)} segments"
            )
    ends_B = torch.tensor(lengths).cumsum(0)
    images_T = (input_ids_T == IMAGE_TOKEN_ID).cumsum(0)
    before = [0, *images_T[ends_B - 1].tolist()]
    counts = [after - earlier for earlier, after in itertools.pairwise(before)]
    firsts_B = labels_T[torch.cat([ends_B.new_zeros(1), ends_B[:-1]])]
    for sample, first, count in zip(samples, firsts_B.tolist(), counts):
        if first != IGNORE_INDEX:
            raise ValueError(f"sample {sample.key}: its first token is a label, and no row predicts a first token")
        _check_images(sample, count)
    return counts


def _check_images(sample: EncodedSample, num_images: int) -> None:
    for view, images_N3HW in [*sample.images.items(), *sample.features.items()]:
        tilings = sample.tilings.get(view)
        found = len(images_N3HW) if tilings is None else len(tilings)
        if found != num_images:
            raise ValueError(f"sample {sample.key}: {num_images} image placeholders, {found} images in view {view!r}")
        if tilings is not None and sum(tiling.num_tiles for tiling in tilings) != len(images_N3HW):
            raise ValueError(f"sample {sample.key}: {len(images_N3HW)} tiles in view {view!r}, not those of {tilings}")
    if num_images and DEFAULT_VIEW not in {*sample.images, *sample.features}:
        raise ValueError(f"sample {sample.key}: {num_images} image placeholders but no images")


def _merge_views(samples: Sequence[EncodedSample], num_images: int) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    if all(sample.features and not sample.images for sample in samples):
        return merged
    for view in dict.fromkeys([DEFAULT_VIEW, *(view for sample in samples for view in sample.images)]):
        seen = [sample for sample in samples if view in sample.images]
        parts = [sample.images[view] for sample in seen]
        merged[view] = torch.cat(parts) if parts else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        found = sum(len(sample.tilings.get(view, sample.images[view])) for sample in seen)
        if found != num_images:
            raise ValueError(f"view {view!r} has {found} images, the micro-batch {num_images}")
    return merged


def _merge_features(samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
    names = dict.fromkeys(view for sample in samples for view in sample.features)
    for view in names:
        missing = [sample.key for sample in samples if view not in sample.features]
        if missing:
            raise ValueError(f"sample {missing[0]} has no cached features, others of its micro-batch have; write them")
    return {view: torch.cat([sample.features[view] for sample in samples]) for view in names}


def _merge_tilings(samples: Sequence[EncodedSample]) -> dict[str, tuple[Tiling, ...]]:
    merged: dict[str, tuple[Tiling, ...]] = {}
    for view in dict.fromkeys(view for sample in samples for view in sample.tilings):
        untiled = [sample.key for sample in samples if view not in sample.tilings and len(sample.images.get(view, ()))]
        if untiled:
            raise ValueError(f"view {view!r} is tiled in some samples of a micro-batch, and not in {untiled[0]}")
        merged[view] = tuple(tiling for sample in samples for tiling in sample.tilings.get(view, ()))
    return merged


def _merge_scales(samples: Sequence[EncodedSample]) -> dict[str, PixelScale]:
    merged: dict[str, PixelScale] = {}
    for sample in samples:
        for view, scale in sample.scales.items():
            if merged.setdefault(view, scale) != scale:
                raise ValueError(f"view {view!r} of sample {sample.key} has another mean or std than those before it")
    for sample in samples:
        strays = [view for view in merged if view not in sample.scales and len(sample.images.get(view, ()))]
        if strays:
            raise ValueError(f"view {strays[0]!r} holds levels, in sample {sample.key} normalised pixels")
    return merged


def _merge_cached_rows(samples: Sequence[EncodedSample]) -> CachedRows | None:
    parts = [sample.cached_rows for sample in samples if sample.cached_rows is not None]
    if parts and len(parts) < len(samples):
        missing = next(sample.key for sample in samples if sample.cached_rows is None)
        raise ValueError(f"sample {missing} has no teacher rows, others of its micro-batch have; cache every source")
    return CachedRows.concatenate(parts) if parts else None


def _merge_teacher_side(samples: Sequence[EncodedSample], position: int) -> dict[str, Any]:
    """The teacher's own batch, and the spans in both rows."""
    teachers = [sample.teacher for sample in samples if sample.teacher is not None]
    if not teachers:
        return {}
    assert len(teachers) == len(samples)
    parts, start = [], torch.zeros(4, dtype=torch.int64)
    for sample, teacher in zip(samples, teachers):
        assert sample.spans is not None
        parts.append(sample.spans + start)
        start = start + torch.tensor([len(sample.input_ids)] * 2 + [len(teacher.input_ids)] * 2)
    return {"teacher_batch": pack(teachers, position), "spans": AlignedSpans(torch.cat(parts))}


def _count_pairs(samples: Sequence[EncodedSample]) -> int:
    members: dict[int, list[bool]] = {}
    for sample in samples:
        if sample.pair_id != NO_PAIR:
            members.setdefault(sample.pair_id, []).append(sample.is_chosen)
    for pair_id, chosen in members.items():
        if sorted(chosen) != [False, True]:
            raise ValueError(
                f"pair {pair_id} needs one chosen and one rejected sequence in a micro-batch, got {chosen}"
            )
    return len(members)
