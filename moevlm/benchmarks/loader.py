"""Suite `loader`: images a second from shards to packed batches, over decoding and resizing the same images alone.

A step is eight samples: read from a tar, decoded, resized, tokenized and packed, as a loader worker does it; pixels
leave as 8-bit levels. The floor of a case decodes and resizes the eight images with the same libraries and does nothing
else. The last case is a loader with workers: each row takes four batches from every worker, so that with perfect
scaling all rows take the seconds of the first. By itself (``python -m moevlm.benchmarks.loader``) it prints the floor
and the loader batch by batch in turn, the rate of several workers over one, and the share of a step that is waited.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
SAMPLES_A_SECOND = (32, 128)
"""What a consumer takes: a GPU that trains a 1.8B model (16 samples in 0.51 s, docs/performance.md); four of them."""

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
    "full": (Problem("640 x 480", 640, 480, workers=(1, 2, 4, 8, 16)), Problem("1280 x 960", 1280, 960)),
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


def _batches_of_workers(
    shards: IndexedShards, problem: Problem, num_workers: int, *, pin_memory: bool = False
) -> Iterator[VLMBatch]:
    batches = Batches(shards, make_processor(problem, WAYS["torch"]), 1 << 20)
    options: dict[str, Any] = {"batch_size": None, "collate_fn": _as_it_is, "prefetch_factor": 2}
    options["pin_memory"] = pin_memory
    return iter(DataLoader(batches, num_workers=num_workers, **options))


def scaling(problem: Problem, counts: Sequence[int], *, seconds: float = 2.0) -> dict[int, float]:
    """Images a second for each number of workers, in the time after every worker has handed over two batches."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(problem, Path(folder))
        for num_workers in counts:
            iterator, taken = _batches_of_workers(shards, problem, num_workers), 0
            for _ in range(4 * num_workers):  # what is prefetched and twice that
                next(iterator)
            start = time.perf_counter()
            while time.perf_counter() - start < seconds or taken < num_workers:
                next(iterator)
                taken += 1
            rates[num_workers] = taken * BATCH / (time.perf_counter() - start)
            del iterator  # ends the workers
    return rates


class Waiting(NamedTuple):
    """Shares of the time of some steps."""

    data: float  # the main process waits for the loader
    copying: float  # and hands the batch to the device


def waiting_share(
    problem: Problem, *, num_workers: int, step_seconds: float, steps: int = 40, device: torch.device | None = None
) -> Waiting:
    """What a consumer of one micro-batch every `step_seconds` waits for.

    On a GPU the step is a real one: products that take so long, queued behind the copy of a pinned batch.
    """
    work = _Busy(device, step_seconds)
    with tempfile.TemporaryDirectory() as folder:
        shards, on_gpu = make_shards(problem, Path(folder)), device is not None and device.type == "cuda"
        iterator = _batches_of_workers(shards, problem, num_workers, pin_memory=on_gpu)
        for _ in range(2 * num_workers):
            next(iterator)
        waited, copied, start = 0.0, 0.0, time.perf_counter()
        for _ in range(steps):
            times = [time.perf_counter()]
            batch = next(iterator)
            times.append(time.perf_counter())
            if on_gpu and device is not None:
                batch.to(device, non_blocking=True).view("default")
            times.append(time.perf_counter())
            waited, copied = waited + times[1] - times[0], copied + times[2] - times[1]
            work()
        total = time.perf_counter() - start
        return Waiting(waited / total, copied / total)


class _Busy:
    """A step of some length: products on a GPU, sleep elsewhere."""

    def __init__(self, device: torch.device | None, seconds: float) -> None:
        self.device, self.seconds, self.repeats = device, seconds, 0
        if device is None or device.type != "cuda":
            return
        self.matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        self.repeats = 20
        for _ in range(3):  # the last is the measure
            start = time.perf_counter()
            self()
            once = (time.perf_counter() - start) / self.repeats
        self.repeats = max(1, round(seconds / once))

    def __call__(self) -> None:
        if self.device is None or self.device.type != "cuda":
            time.sleep(self.seconds)
            return
        for _ in range(self.repeats):
            torch.mm(self.matrix, self.matrix)
        torch.cuda.synchronize(self.device)


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


def report(size: str = "full", *, rounds: int = 40, seconds: float = 2.0) -> None:
    """Print interleaved rates in CPU time, which bear a machine that others use; scaling and waiting, which do not."""
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for problem in PROBLEMS[size]:
        for way in WAYS:
            floor, ours = interleaved(problem, way, rounds=rounds, clock=time.process_time)
            print(f"{problem.name:12} {way:14} decode + resize {floor:5.0f}  loader {ours:5.0f}  {ours / floor:.2f}")
    first = PROBLEMS[size][0]
    rates = scaling(first, first.workers, seconds=seconds)
    for num_workers, rate in rates.items():
        one = rates[first.workers[0]]
        print(f"{num_workers:2} workers on {cores} cores: {rate:6.0f} images/s, {rate / one:5.2f} times one")
    for samples in SAMPLES_A_SECOND:
        for num_workers in [number for number in first.workers if number <= cores]:
            step = BATCH / samples
            shares = waiting_share(
                first, num_workers=num_workers, step_seconds=step, steps=max(8, int(seconds / step)), device=device
            )
            told = f"waits {100 * shares.data:5.2f} % of the time for data, {100 * shares.copying:.2f} % for the copy"
            print(f"{num_workers:2} workers, {samples} samples a second on {device.type}: {told}", flush=True)


def main() -> None:
    """Read how long to measure from the command line."""
    parser = argparse.ArgumentParser(description=report.__doc__)
    parser.add_argument("--size", choices=list(PROBLEMS), default="full")
    parser.add_argument("--rounds", type=int, default=40, help="batches of each interleaved rate")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each number of workers")
    chosen = parser.parse_args()
    report(chosen.size, rounds=chosen.rounds, seconds=chosen.seconds)


if __name__ == "__main__":
    main()
