"""Fills teacher caches: a frozen model reads every sample of a shard folder once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moevlm.batch import IGNORE_INDEX, TEACHER_VIEW, CachedRows, EncodedSample, VLMBatch, VLMOutput
from moevlm.data.cache_key import NO_TOKENS, CacheKey, token_hash
from moevlm.data.reader import IndexedShards
from moevlm.data.rejection import RejectedRecord
from moevlm.data.sample_cache import Values, write_cache
from moevlm.losses.log_probs import sequence_log_probs
from moevlm.losses.stored_rows import sampled_rows, top_k_rows
from moevlm.models.pretrained import load_pretrained
from moevlm.models.vlm import VLM
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.processor import Processor
from moevlm.preprocessing.rejection import RejectedSample


@dataclass(frozen=True)
class CacheRequest:
    """A cache that a run needs."""

    shards: str  # the shard folder
    key: CacheKey
    model: str  # the model folder
    processor: Processor  # of the student, with the teacher's view where that differs
    view: str = TEACHER_VIEW  # whose images the model sees; DEFAULT_VIEW for a reference that is the student itself


def fill_cache(
    request: CacheRequest,
    *,
    batch_size: int = 16,
    device: str = "cpu",
    dtype: str | None = None,
    part: int = 0,
    num_parts: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> bool:
    """Write what is not there of a cache; a run that was stopped goes on at the next tar.

    Args:
        batch_size: samples of a forward pass.
        dtype: of the model's parameters; float32 when None.
        part, num_parts: see `write_cache`.
        progress: called with the number of samples after each batch.

    Returns:
        Whether the cache is complete.
    """
    began = time.monotonic()
    model = load_pretrained(request.model, dtype=dtype).to(device).requires_grad_(False)
    reader = IndexedShards(request.shards)

    def values_of(tar: int) -> Iterator[tuple[int, Values]]:
        first = sum(reader.sizes[:tar])
        generator = torch.Generator(device).manual_seed(request.key.seed * 1_000_003 + tar)
        for start in range(first, first + reader.sizes[tar], batch_size):
            numbers = range(start, min(start + batch_size, first + reader.sizes[tar]))
            yield from _read_batch(model, reader, numbers, request, generator)
            progress(len(numbers))

    notes = {"model": request.model, "dtype": dtype or "float32"}
    is_complete = write_cache(request.shards, request.key, values_of, part=part, num_parts=num_parts, notes=notes)
    print(f"wrote {request.key.folder(request.shards)} in {time.monotonic() - began:.1f} s")
    return is_complete


def _read_batch(
    model: VLM, reader: IndexedShards, numbers: Iterable[int], request: CacheRequest, generator: torch.Generator
) -> Iterator[tuple[int, Values]]:
    groups = [_encode(reader, number, request) for number in numbers]
    found = iter(_ask(model, [sample for group in groups for sample in group], request, generator))
    for group in groups:
        values = [next(found) for _ in group]
        yield (token_hash(group), _joined(values)) if group else (NO_TOKENS, {})


def _encode(reader: IndexedShards, number: int, request: CacheRequest) -> list[EncodedSample]:
    try:
        record = reader.read(number)
        if request.key.kind == "reference":
            return request.processor.encode(record, pair_id=number)
        return request.processor.encode(record)
    except (RejectedRecord, RejectedSample):
        return []  # training rejects it, too


@torch.no_grad()
def _ask(model: VLM, samples: list[EncodedSample], request: CacheRequest, generator: torch.Generator) -> list[Values]:
    """Values of each sequence."""
    if not samples:
        return []
    batch = pack(samples).to(next(model.parameters()).device)
    output = model(batch, view=request.view)
    if request.key.kind == "reference":
        log_probs_B = sequence_log_probs(output, model.head, batch.labels, batch.sequence_ids())
        return [{"log_probs": np.array([[value]], dtype=np.float32)} for value in log_probs_B.tolist()]
    rows = _rows(model, batch, output, request.key, generator)
    values: list[Values] = []
    start = 0
    for sample in samples:
        part = slice(start, start + int((sample.labels != IGNORE_INDEX).sum()))
        values.append({name: _numpy(getattr(rows, name)[part], width) for name, _, width in request.key.fields})
        start = part.stop
    return values


def _rows(model: VLM, batch: VLMBatch, output: VLMOutput, key: CacheKey, generator: torch.Generator) -> CachedRows:
    rows_RD = output.hidden_states[output.prediction_rows(batch.labels)[0]]
    if key.kind == "top_k":
        return top_k_rows(rows_RD, model.head, k=key.width, vocab_size=key.vocab_size)
    if key.kind == "sampled":
        settings: dict[str, Any] = {"num_draws": key.width, "proposal": key.proposal, "vocab_size": key.vocab_size}
        return sampled_rows(rows_RD, model.head, generator=generator, **settings)
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[key.dtype]
    return CachedRows("hidden", hidden_states=rows_RD.to(dtype))


def _numpy(values: torch.Tensor, width: int) -> np.ndarray:
    values = values.reshape(values.shape[0], width).cpu()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def _joined(values: list[Values]) -> Values:
    return {name: np.concatenate([value[name] for value in values]) for name in values[0]}
