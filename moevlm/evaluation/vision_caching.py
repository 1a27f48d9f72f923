"""Fills vision caches: a frozen encoder sees every image of a shard folder once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moevlm.data.reader import IndexedShards
from moevlm.data.rejection import RejectedRecord
from moevlm.data.sample_cache import Values, write_cache
from moevlm.data.vision_cache import VisionKey, name_hash
from moevlm.models.pretrained import DTYPES
from moevlm.models.vision_encoder import VisionEncoder
from moevlm.preprocessing.images import ImageTransform
from moevlm.preprocessing.rejection import RejectedSample


@dataclass(frozen=True)
class VisionRequest:
    """A vision cache that a run needs."""

    shards: str  # the shard folder
    key: VisionKey
    load: Callable[[], VisionEncoder]
    transform: ImageTransform


def fill_vision_cache(
    request: VisionRequest,
    *,
    batch_size: int = 32,
    device: str = "cpu",
    dtype: str | None = None,
    part: int = 0,
    num_parts: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> bool:
    """Write what is not there of a cache; the arguments are those of `fill_cache`.

    Returns:
        Whether the cache is complete.
    """
    began = time.monotonic()
    encoder = request.load().to(device, DTYPES[dtype or "float32"]).eval().requires_grad_(False)
    reader = IndexedShards(request.shards)

    def values_of(tar: int) -> Iterator[tuple[int, Values]]:
        first = sum(reader.sizes[:tar])
        for start in range(first, first + reader.sizes[tar], batch_size):
            numbers = range(start, min(start + batch_size, first + reader.sizes[tar]))
            yield from _read_batch(encoder, reader, numbers, request, batch_size)
            progress(len(numbers))

    notes = {"encoder": str(encoder.config["name"]), "dtype": dtype or "float32"}
    is_complete = write_cache(request.shards, request.key, values_of, part=part, num_parts=num_parts, notes=notes)
    print(f"wrote {request.key.folder(request.shards)} in {time.monotonic() - began:.1f} s")
    return is_complete


def _read_batch(
    encoder: VisionEncoder, reader: IndexedShards, numbers: Iterable[int], request: VisionRequest, batch_size: int
) -> Iterator[tuple[int, Values]]:
    pictures = [_pictures(reader, number, request.transform) for number in numbers]
    counts = [len(one) for one in pictures]
    features_MPD = _encode(encoder, torch.cat(pictures), request, batch_size) if sum(counts) else None
    start = 0
    for number, count in zip(numbers, counts):
        values = {} if not count or features_MPD is None else {"features": features_MPD[start : start + count]}
        yield name_hash(reader.name(number)), values
        start += count


def _pictures(reader: IndexedShards, number: int, transform: ImageTransform) -> Tensor:
    """[M, 3, H, W] levels; none where training rejects the sample, too, or it has no image."""
    try:
        return transform.stack(reader.read(number).images)[0]
    except (RejectedRecord, RejectedSample):
        return transform.stack(())[0]


@torch.no_grad()
def _encode(encoder: VisionEncoder, levels_M3HW: Tensor, request: VisionRequest, batch_size: int) -> np.ndarray:
    """[M, P * width] in the cache's dtype."""
    device, stored = next(encoder.parameters()).device, DTYPES[request.key.dtype]
    parts = [
        encoder(request.transform.scale.normalise(some.to(device))).to("cpu", stored)
        for some in levels_M3HW.split(batch_size)
    ]
    rows = torch.cat(parts).flatten(1)
    return (rows.view(torch.uint16) if stored == torch.bfloat16 else rows).numpy()
