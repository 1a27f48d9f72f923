"""Records with new answers: a teacher's own, and pairs of a student's that a teacher judges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from moevlm.batch import NO_PAIR, EncodedSample, Record, Turn
from moevlm.data.reader import IndexedShards
from moevlm.data.rejection import RejectedRecord, Rejection
from moevlm.evaluation.generation import generate
from moevlm.losses.log_probs import sequence_log_probs
from moevlm.models.vlm import VLM
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.processor import Processor
from moevlm.preprocessing.rejection import RejectedSample

Items = Iterator[Record | Rejection]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are made."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0 is greedy
    batch_size: int = 32
    seed: int = 0
    decoding: str = "auto"  # how a step runs, see `moevlm.evaluation.decoding.Session`


def teacher_answers(
    vlm: VLM, processor: Processor, shards: IndexedShards, sampling: Sampling, *, limit: int | None = None
) -> Items:
    """Every record with the model's own answers in place of the given ones (sequence-level KD, arXiv:1606.07947).

    Rounds follow one another: a later question is asked after the model's own earlier answers. Of a preference record
    the chosen conversation is asked. A record with an empty answer comes as a Rejection.
    """
    for records in _windows(shards, sampling.batch_size, limit):
        usable = [record for record in records if isinstance(record, Record)]
        yield from (record for record in records if isinstance(record, Rejection))
        told: list[list[Turn]] = [[] for _ in usable]
        silent: set[int] = set()
        while True:
            asking = [n for n, record in enumerate(usable) if n not in silent and _to_next_answer(record, told[n])]
            if not asking:
                break
            texts = _answer(vlm, processor, [(usable[n], told[n]) for n in asking], sampling)
            for n, text in zip(asking, texts):
                told[n].append(Turn("assistant", text))
                if not text:
                    silent.add(n)
        for n, (record, turns) in enumerate(zip(usable, told)):
            if n in silent:
                yield Rejection(record.key, "empty_answer", "the model said nothing")
            else:
                yield Record(record.key, tuple(turns), record.images, metadata={**record.metadata, "answered": "model"})


def judged_pairs(
    student: VLM,
    teacher: VLM,
    processors: tuple[Processor, Processor],
    shards: IndexedShards,
    sampling: Sampling,
    *,
    num_answers: int = 4,
    min_margin: float = 0.0,
    limit: int | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Items:
    """Preference pairs from the student as it is now: of its answers to a record's last question, the teacher's
    favourite is chosen and the one that the teacher likes least is rejected.

    The judge is the teacher's mean log-probability of an answer's tokens, ``1/n sum_t log p_T(y_t | y_<t, x)``, so that
    longer answers are not the worse ones (ours; RLAIF-V, arXiv:2405.17220, asks a judge about split claims).

    Args:
        processors: the student's and the teacher's; tokenizers and image transforms may differ.
        num_answers: drawn for each question, at ``sampling.temperature``.
        min_margin: smallest difference of the two judgements, nats a token; closer pairs come as Rejections.
    """
    for number, records in enumerate(_windows(shards, sampling.batch_size, limit)):
        usable = [record for record in records if isinstance(record, Record) and record.turns[-1].role == "assistant"]
        yield from (record for record in records if isinstance(record, Rejection))
        asked = [(record, list(record.turns[:-1])) for record in usable]
        drawn = [
            _answer(
                student, processors[0], asked, dataclasses.replace(sampling, seed=_draw_seed(sampling, number, draw))
            )
            for draw in range(num_answers)
        ]
        for record, answers in zip(usable, zip(*drawn)):
            progress()
            yield _pair(teacher, processors[1], record, sorted({text for text in answers if text.strip()}), min_margin)


def _pair(
    teacher: VLM, processor: Processor, record: Record, answers: list[str], min_margin: float
) -> Record | Rejection:
    if len(answers) < 2:
        return Rejection(record.key, "identical_pair", f"{len(answers)} different answers")
    asked = record.turns[:-1]
    records = [Record(record.key, (*asked, Turn("assistant", text)), record.images) for text in answers]
    try:
        scores = _judge(teacher, [sample for one in records for sample in processor.encode(one)])
    except RejectedSample as rejected:
        return Rejection(record.key, rejected.reason, rejected.detail)
    best, worst = max(range(len(scores)), key=scores.__getitem__), min(range(len(scores)), key=scores.__getitem__)
    margin = scores[best] - scores[worst]
    if margin <= min_margin:
        return Rejection(record.key, "small_margin", f"{margin:.4f} nats a token, {min_margin:g} asked for")
    metadata = {**record.metadata, "judged_margin": round(margin, 6)}
    return Record(record.key, records[best].turns, record.images, records[worst].turns, metadata)


@torch.no_grad()
def _judge(teacher: VLM, samples: Sequence[EncodedSample]) -> list[float]:
    batch = pack([dataclasses.replace(sample, pair_id=NO_PAIR) for sample in samples])
    batch = batch.to(next(teacher.parameters()).device)
    output = teacher(batch)
    scores_B = sequence_log_probs(output, teacher.head, batch.labels, batch.sequence_ids(), length_normalised=True)
    return [float(score) for score in scores_B]


def _answer(
    vlm: VLM, processor: Processor, asked: Sequence[tuple[Record, list[Turn]]], sampling: Sampling
) -> list[str]:
    prompts = [processor.encode_prompt(turns, _images_of(record, turns), key=record.key) for record, turns in asked]
    device = next(vlm.parameters()).device
    found = generate(
        vlm,
        prompts,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_ids=processor.stop_token_ids,
        batch_size=sampling.batch_size,
        temperature=sampling.temperature,
        generator=torch.Generator(device).manual_seed(sampling.seed),
        decoding=sampling.decoding,
    )
    return [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]


def _images_of(record: Record, turns: Sequence[Turn]) -> tuple[Any, ...]:
    return record.images[: sum(turn.text.count("<image>") for turn in turns)]


def _to_next_answer(record: Record, told: list[Turn]) -> bool:
    """Tell the turns before the next answer; whether there is one."""
    for turn in record.turns[len(told) :]:
        if turn.role == "assistant":
            return True
        told.append(turn)
    return False


def _draw_seed(sampling: Sampling, window: int, draw: int) -> int:
    return (sampling.seed * 1_000_003 + window) * 1009 + draw


def _windows(shards: IndexedShards, size: int, limit: int | None) -> Iterator[list[Record | Rejection]]:
    count = len(shards) if limit is None else min(limit, len(shards))
    for start in range(0, count, size):
        window: list[Record | Rejection] = []
        for number in range(start, min(start + size, count)):
            try:
                window.append(shards.read(number))
            except RejectedRecord as rejected:
                window.append(Rejection(shards.name(number), rejected.reason, rejected.detail))
        yield window
