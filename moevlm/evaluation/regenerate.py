"""A packed micro-batch with answers of the model's own: what on-policy distillation trains on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from moevlm.batch import IGNORE_INDEX, EncodedSample, Segment, VLMBatch
from moevlm.evaluation.generation import generate
from moevlm.models.vlm import VLM
from moevlm.preprocessing.collate import pack


def sequences_of(batch: VLMBatch) -> list[EncodedSample]:
    """The sequences that `pack` joined."""
    samples = []
    for row in range(batch.num_sequences):
        one = batch.select([row])
        key, source = (batch.keys[row] if batch.keys else str(row)), int(one.sources[0])
        fields = (one.input_ids, one.labels, one.segments, one.images)
        samples.append(EncodedSample(key, *fields, source=source, tilings=one.tilings, scales=one.scales))
    return samples


def regenerate(
    vlm: VLM,
    batch: VLMBatch,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    keep_going: Callable[[bool], bool] = bool,
) -> VLMBatch:
    """The same prompts with answers that the model gives now, which become the labels (GKD, arXiv:2306.13649).

    A prompt reaches to the first supervised token; what stood behind it is dropped, further rounds included. An answer
    ends with the token that ended the given one, unless it ran into `max_new_tokens`. A sequence without a supervised
    token stays as it is. Pairs and cached rows are of the given answers, so they are dropped.

    Args:
        vlm: in eval mode.
        max_new_tokens: longest answer.
        temperature: of the draws; 0 is greedy.
        generator: of the draws, on the batch's device.
        keep_going: see `generate`.
    """
    samples = sequences_of(batch)
    firsts = [_first_answer(sample) for sample in samples]
    prompts = [_prompt(sample, start) for sample, (start, _) in zip(samples, firsts)]
    answers = generate(
        vlm,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_token_ids={stop for _, stop in firsts if stop >= 0},
        batch_size=len(prompts),
        temperature=temperature,
        generator=generator,
        keep_going=keep_going,
        decoding="eager",  # one batch a session, and other threads of a training talk to the GPU: nothing to capture
    )
    answered = [
        sample if stop < 0 else _with_answer(prompt, answer + [stop] * (len(answer) < max_new_tokens))
        for sample, prompt, answer, (_, stop) in zip(samples, prompts, answers, firsts)
    ]
    return pack(answered, batch.position).to(batch.input_ids.device)


def _first_answer(sample: EncodedSample) -> tuple[int, int]:
    """Where the first answer begins, and the token that ends it; the end and -1 where there is none."""
    supervised = (sample.labels != IGNORE_INDEX).tolist()
    if True not in supervised:
        return len(supervised), -1
    start = supervised.index(True)
    length = next((n for n, flag in enumerate(supervised[start:]) if not flag), len(supervised) - start)
    return start, int(sample.labels[start + length - 1])


def _prompt(sample: EncodedSample, end: int) -> EncodedSample:
    """The first tokens, with the images that stand among them."""
    count = int((sample.segments[:end] == Segment.IMAGE).sum())
    tilings = {view: found[:count] for view, found in sample.tilings.items()}
    rows = {view: sum(one.num_tiles for one in tilings[view]) if view in tilings else count for view in sample.images}
    return dataclasses.replace(
        sample,
        input_ids=sample.input_ids[:end],
        labels=torch.full_like(sample.labels[:end], IGNORE_INDEX),
        segments=sample.segments[:end],
        images={view: pixels[: rows[view]] for view, pixels in sample.images.items()},
        tilings=tilings,
    )


def _with_answer(prompt: EncodedSample, answer: list[int]) -> EncodedSample:
    ids = torch.tensor(answer, dtype=torch.int64, device=prompt.input_ids.device)
    return dataclasses.replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, ids]),
        labels=torch.cat([prompt.labels, ids]),
        segments=torch.cat([prompt.segments, torch.full_like(ids, int(Segment.ANSWER))]),
    )
