"""Where the wall time of a program goes: its main thread's stack, looked at every few milliseconds.

Sampling costs nothing that could be seen and needs no hooks in what is measured; a backward pass, which runs in threads
of its own, shows as the main thread waiting for it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

Frame = tuple[str, str]
"""File and function."""

PARTS: tuple[tuple[str, str, str], ...] = (
    ("imports", "importlib", ""),
    ("data", "utils/data/dataloader", "__next__"),
    ("validation", "evaluation_loop", ""),
    ("optimizer", "torch/optim/", ""),
    ("backward", "torch/autograd/", "backward"),
    ("checkpoints", "callbacks/checkpoint", ""),
    ("checkpoints", "checkpoint_io", ""),
    ("checkpoints", "checkpoint_connector", ""),
    ("data", "datamodules/", ""),
    ("forward and losses", "", "compute_losses"),
    ("generation", "evaluation/generation", "generate"),
    ("gold answers", "evaluation/perplexity", "gold_nlls"),
    ("teacher passes", "evaluation/teacher_caching", "_ask"),
    ("routing records", "analysis/collect", ""),
    ("pixels and tokens", "moevlm/preprocessing", ""),
    ("drawing scenes", "world/rendering", ""),
    ("texts of scenes", "moevlm/world/", ""),
    ("checking images", "image_files", "check_image"),
    ("reading records", "data/records", ""),
    ("writing shards", "data/shards", ""),
    ("figures", "matplotlib", ""),
    ("figures", "analysis/figures", ""),
    ("loading models", "models/pretrained", ""),
    ("logging", "logger", ""),
    ("logging", "logging", ""),
    ("logging", "wandb", ""),
    ("rest of a step", "", "training_step"),
    ("callbacks", "callbacks", ""),
    ("rest of fit", "", "fit"),
)
"""Name, part of a file's path, start of a function's name; the first line that some frame of a stack fits names it."""

MODEL_MATH = (
    "forward and losses",
    "backward",
    "optimizer",
    "validation",
    "generation",
    "gold answers",
    "teacher passes",
    "routing records",
)
START_AND_END = "start and end"


def part_of(stack: list[Frame]) -> str:
    """Which part of training a stack belongs to."""
    for name, file, function in PARTS:
        if any(file in at and called.startswith(function) for at, called in stack):
            return name
    return START_AND_END


class Samples:
    """Counts of the parts seen."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def shares(self) -> dict[str, float]:
        """Of all samples, the largest first."""
        total = max(sum(self.counts.values()), 1)
        return {name: count / total for name, count in self.counts.most_common()}


@contextmanager
def sampled(every_seconds: float = 0.01) -> Iterator[Samples]:
    """Look at the calling thread until the block ends."""
    samples, done, watched = Samples(), threading.Event(), threading.get_ident()

    def watch() -> None:
        while not done.wait(every_seconds):
            samples.counts[part_of(_stack(sys._current_frames().get(watched)))] += 1

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _stack(frame: FrameType | None) -> list[Frame]:
    found: list[Frame] = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return found


@contextmanager
def told() -> Iterator[None]:
    """Sample the block, and print its shares."""
    before, start = time.process_time(), time.perf_counter()
    try:
        with sampled() as samples:
            yield
    finally:
        print(describe(samples, time.perf_counter() - start))
        print(f"before that, imports and configs: {before:.0f} s of CPU time")


def describe(samples: Samples, seconds: float) -> str:
    """A line for each part."""
    shares = samples.shares()
    math = sum(shares.get(name, 0.0) for name in MODEL_MATH)
    lines = [f"{100 * share:5.1f} %  {name}" for name, share in shares.items()]
    return "\n".join([f"{seconds:.0f} s, of which model math {100 * math:.1f} %", *lines])
