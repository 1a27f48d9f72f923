"""Suite `loader`: images a second from shards to packed batches, over decoding and resizing the same images alone.

A step is eight samples: read from a tar, decoded, resized, tokenized and packed, as a loader worker does it; pixels
leave as 8-bit levels. The floor of a case decodes and resizes the eight images with the same libraries and does nothing
else. The last case is a loader with workers: each row takes four batches from every worker, so that with perfect
scaling all rows take the seconds of the first.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from moevlm.batch import Record, Turn, VLMBatch
from moevlm.benchmarks.harness import Case, Contender, Work
from moevlm.data.reader import IndexedShards
from moevlm.data.shards import write_shards
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.fast_images import decode_jpeg, resize_in_torch
from moevlm.preprocessing.images import ImageTransform
from moevlm.preprocessing.processor import Processor
from moevlm.preprocessing.tokenizer_training import train_tokenizer

BATCH = 8
WAYS: dict[str, dict[str, Any]] = {
    "pil": {},
    "torch": {"resizer": "torch"},
    "torch, draft": {"resizer": "torch", "draft": True},
}
TURNS = (
    Turn("user", "<image>\nWhat is in the picture?"),
    Turn("assistant", "A red circle and a blue square. " * 8),
)


@dataclass(frozen=True)
class Problem:
    """Size of the JPEGs, of what the encoder sees, and how many samples there are."""

    name: str
    width: int
    height: int
    side: int = 336
    num_samples: int = 64
    workers: tuple[int, ...] = ()


PROBLEMS = {
    "full": (Problem("640 x 480", 640, 480, workers=(1, 2, 4, 8)), Problem("1280 x 960", 1280, 960)),
    "tiny": (Problem("64 x 48", 64, 48, side=32, num_samples=16, workers=(1,)),),
}


def cases(*, size: str, device: torch.device) -> Iterator[Case]:
    """Each way of resizing, at each size; `device` is not used."""
    torch.set_num_threads(1)  # as in a loader worker
    for problem in PROBLEMS[size]:
        with tempfile.TemporaryDirectory() as folder:
            shards = make_shards(problem, Path(folder))
            for name, options in WAYS.items():
                processor = make_processor(problem, options)
                yield Case(
                    f"{problem.name}, {name}",
                    [
                        Contender("decode and resize", partial(_bare, problem, shards, options)),
                        Contender("loader", partial(_loader, shards, processor)),
                    ],
                    floor="decode and resize",
                )
            if problem.workers:
                counts = [Contender(f"{n} workers", partial(_workers, shards, problem, n)) for n in problem.workers]
                yield Case(f"{problem.name}, torch, workers", counts, floor=counts[0].name)


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A made-up JPEG of quality 90: smooth shapes and some noise, about 0.35 bytes a pixel."""
    draws = np.random.default_rng(seed)
    small = Image.fromarray(draws.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    noisy = (smooth + draws.integers(-12, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_shards(problem: Problem, folder: Path) -> IndexedShards:
    """One image under many keys, in a tar."""
    data = photograph(problem.width, problem.height)
    records = (Record(f"s{number:04d}", TURNS, (data,)) for number in range(problem.num_samples))
    write_shards(records, folder, overwrite=True)
    return IndexedShards(folder)


def make_processor(problem: Problem, options: dict[str, Any]) -> Processor:
    """With a small byte-level tokenizer."""
    tokenizer = train_tokenizer([turn.text for turn in TURNS] * 20, vocabulary_size=330)
    return Processor(tokenizer, "chatml", ImageTransform(problem.side, mode="stretch", **options))


class Batches(Dataset[VLMBatch]):
    """``batches[n]`` is the n-th packed micro-batch of `BATCH` samples."""

    def __init__(self, shards: IndexedShards, processor: Processor, length: int) -> None:
        self.shards, self.processor, self.length = shards, processor, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> VLMBatch:
        first = number * BATCH % len(self.shards)
        records = [self.shards.read(first + place) for place in range(BATCH)]
        texts = [self.processor.encode_text(record) for record in records]  # texts first, as `datamodules.steps` does
        return pack([sample for text in texts for sample in text.with_images()])


def _bare(problem: Problem, shards: IndexedShards, options: dict[str, Any]) -> Work:
    images = [record.images[0] for record in itertools.islice(shards, BATCH)]
    size, bicubic = (problem.side, problem.side), Image.Resampling.BICUBIC
    least = size if options.get("draft") else None

    def step() -> None:
        for data in images:
            pixels_HW3 = decode_jpeg(data, least)
            assert pixels_HW3 is not None
            if options:
                resize_in_torch(pixels_HW3, size, bicubic)
            else:
                Image.fromarray(pixels_HW3).resize(size, bicubic)

    return Work(step, units={"image": BATCH})


def _loader(shards: IndexedShards, processor: Processor) -> Work:
    batches = Batches(shards, processor, 1 << 30)
    numbers = itertools.count()
    return Work(lambda: batches[next(numbers)], units={"image": BATCH})


def _workers(shards: IndexedShards, problem: Problem, num_workers: int) -> Work:
    """The steady rate: workers are running, and each has handed over batches before."""
    iterator = _batches_of_workers(shards, problem, num_workers)
    taken = 4 * num_workers

    def step() -> None:
        for _ in range(taken):
            next(iterator)

    step()
    return Work(step, units={"image": taken * BATCH})


def _batches_of_workers(shards: IndexedShards, problem: Problem, num_workers: int) -> Iterator[VLMBatch]:
    batches = Batches(shards, make_processor(problem, WAYS["torch"]), 1 << 20)
    options: dict[str, Any] = {"batch_size": None, "collate_fn": _as_it_is, "prefetch_factor": 2}
    return iter(DataLoader(batches, num_workers=num_workers, **options))


def waiting_share(problem: Problem, *, num_workers: int, step_seconds: float, steps: int = 40) -> float:
    """Share of the time that a consumer of one micro-batch every `step_seconds` waits for it."""
    with tempfile.TemporaryDirectory() as folder:
        iterator = _batches_of_workers(make_shards(problem, Path(folder)), problem, num_workers)
        for _ in range(2 * num_workers):
            next(iterator)
        waited, start = 0.0, time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            next(iterator)
            waited += time.perf_counter() - before
            time.sleep(step_seconds)
        return waited / (time.perf_counter() - start)


def _as_it_is(item: VLMBatch) -> VLMBatch:
    return item


def interleaved(problem: Problem, way: str, *, rounds: int = 40, clock: Callable[[], float]) -> tuple[float, float]:
    """Images a second of the floor and of the loader, batch by batch in turn: what disturbs one disturbs the other."""
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(problem, Path(folder))
        works = [_bare(problem, shards, WAYS[way]), _loader(shards, make_processor(problem, WAYS[way]))]
        seconds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for work, taken in zip(works, seconds):
                start = clock()
                work.step()
                taken.append(clock() - start)
    return BATCH / float(np.median(seconds[0])), BATCH / float(np.median(seconds[1]))


def main() -> None:
    """Print interleaved rates in CPU time, for a machine that others use, too."""
    torch.set_num_threads(1)
    for problem in PROBLEMS["full"]:
        for way in WAYS:
            floor, ours = interleaved(problem, way, clock=time.process_time)
            print(f"{problem.name:12} {way:14} decode + resize {floor:5.0f}  loader {ours:5.0f}  {ours / floor:.2f}")
    for num_workers in (1, 2, 4):
        for rate in (30, 120):  # samples a second: what a large and a small model take
            share = waiting_share(PROBLEMS["full"][0], num_workers=num_workers, step_seconds=BATCH / rate)
            print(f"{num_workers} workers, {rate} samples a second: waits {100 * share:.2f} % of the time")


if __name__ == "__main__":
    main()
