"""One loader item is one optimizer step of this rank: the dataset is indexed by step, so workers share the work."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from datamodules.caches import Attach
from datamodules.rejections import RejectedDraw, RejectionLog
from datamodules.vision_caches import Features
from moevlm.batch import EncodedSample, Record, VLMBatch
from moevlm.data.packing import PackedPlan
from moevlm.data.plan import Draw
from moevlm.data.rejection import RejectedRecord
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.rejection import RejectedSample
from moevlm.preprocessing.text_side import TextSide

MAX_ATTEMPTS = 32

Encode = Callable[[Record, int, int], TextSide]
"""(record, source, number that names the draw) -> its text, which makes the sequences when its images are wanted."""


class Reader(Protocol):
    """A source of numbered records: `IndexedShards` or `RecordFile`."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> Record:
        """One record, or RejectedRecord."""

    def name(self, number: int) -> str:
        """The key of a sample, readable or not."""


class Plan(Protocol):
    """Which sample stands at a position, and which may take its place."""

    def draw(self, position: int) -> Draw: ...

    def substitute(self, draw: Draw, attempt: int) -> int: ...


@dataclass
class Step:
    """What a loader worker hands over; a failure travels as text, so that it ends in one line, not in a traceback."""

    batches: list[VLMBatch] = field(default_factory=list)
    rejected: list[RejectedDraw] = field(default_factory=list)
    num_samples: int = 0
    failure: str = ""

    def pin_memory(self) -> Step:
        """The same step in page-locked memory."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class StepDataset(Dataset[Step]):
    """``dataset[step]`` reads, encodes and packs what this rank takes of a step.

    Args:
        readers: the sources; `names` are for messages.
        positions: step -> the positions this rank reads.
        samples_per_step: over all ranks; gives the samples consumed before a step, which its batches carry.
        attach: adds what caches hold of a sample.
        features: of a sample's images, from a vision cache; with `pixels` the images are decoded as well.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        names: Sequence[str],
        plan: Plan,
        encode: Encode,
        *,
        positions: Callable[[int], Sequence[int]],
        samples_per_step: int,
        micro_batch_size: int,
        attach: Attach | None = None,
        features: Features | None = None,
        pixels: bool = True,
    ) -> None:
        self.attach, self.features, self.pixels = attach, features, pixels
        self.readers, self.names, self.plan, self.encode = readers, names, plan, encode
        self.positions, self.samples_per_step, self.micro_batch_size = positions, samples_per_step, micro_batch_size

    def __getitem__(self, step: int) -> Step:
        result = Step()
        groups: list[list[EncodedSample]] = []
        try:
            draws = [self.plan.draw(position) for position in self.positions(step)]
            for start in range(0, len(draws), self.micro_batch_size):
                some = draws[start : start + self.micro_batch_size]
                for draw, text in zip(some, [self._read(draw, draw.sample) for draw in some]):
                    groups.append(self._sample(draw, text, result))
            result.batches = pack_groups(groups, self.micro_batch_size, step * self.samples_per_step)
        except (ValueError, OSError) as error:
            result.failure = str(error)
        result.num_samples = len(groups)
        return result

    def _sample(self, draw: Draw, text: TextSide | RejectedDraw, result: Step) -> list[EncodedSample]:
        """The sequences of a draw, whose text is there already; of a substitute when it cannot be used."""
        number = draw.sample
        for attempt in range(MAX_ATTEMPTS):
            samples = self._finish(draw, number, text if attempt == 0 else self._read(draw, number), result)
            if samples is not None:
                return samples
            number = self.plan.substitute(draw, attempt)
        last = result.rejected[-1]
        raise ValueError(
            f"no usable sample in {MAX_ATTEMPTS} draws from source {last.source}: the last was {last.key} "
            f"({last.reason}: {last.detail}); check the source's shards and the processor's settings"
        )

    def _read(self, draw: Draw, number: int) -> TextSide | RejectedDraw:
        """A sample's text, or why there is none. All texts of a micro-batch come first: images empty the caches."""
        try:
            return self.encode(self.readers[draw.source].read(number), draw.source, draw.position)
        except (RejectedRecord, RejectedSample) as rejected:
            return self._rejected(draw, number, rejected)

    def _finish(
        self, draw: Draw, number: int, text: TextSide | RejectedDraw, result: Step
    ) -> list[EncodedSample] | None:
        """The sequences of a sample, or its name among the rejected."""
        if isinstance(text, TextSide):
            try:
                found = None if self.features is None else self.features(draw.source, number, text.record.key)
                samples = text.with_images(found, pixels=self.pixels)
                return samples if self.attach is None else self.attach(samples, draw.source, number)
            except (RejectedRecord, RejectedSample) as rejected:
                text = self._rejected(draw, number, rejected)
        result.rejected.append(text)
        return None

    def _rejected(self, draw: Draw, number: int, why: RejectedRecord | RejectedSample) -> RejectedDraw:
        key = self.readers[draw.source].name(number)
        return RejectedDraw(draw.position, self.names[draw.source], key, why.reason, why.detail)


class PackedStepDataset(StepDataset):
    """The same with micro-batches of a token budget: `positions` gives rows, and each row is one micro-batch.

    A sample that cannot be used is left out of its row; another of unknown length might not fit. A row of which nothing
    is left takes a substitute.
    """

    def __init__(self, *arguments: Any, rows: PackedPlan, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.rows = rows

    def __getitem__(self, step: int) -> Step:
        result = Step()
        try:
            for number in self.positions(step):
                draws = [self.plan.draw(position) for position in self.rows.row(number)]
                texts = [self._read(draw, draw.sample) for draw in draws]
                tried = [self._finish(draw, draw.sample, text, result) for draw, text in zip(draws, texts)]
                groups = [samples for samples in tried if samples is not None]
                groups = groups or [self._sample(draws[0], self._read(draws[0], draws[0].sample), result)]
                result.batches.append(pack([one for group in groups for one in group], step * self.samples_per_step))
                result.num_samples += len(draws)
        except (ValueError, OSError) as error:
            result.failure = str(error)
        return result


def pack_groups(groups: Sequence[list[EncodedSample]], micro_batch_size: int, position: int) -> list[VLMBatch]:
    """Micro-batches of `micro_batch_size` samples; the sequences of one sample (a pair) stay together."""
    starts = range(0, len(groups), micro_batch_size)
    chunks = [[one for group in groups[start : start + micro_batch_size] for one in group] for start in starts]
    return [pack(chunk, position) for chunk in chunks]


class StepSampler(Sampler[int]):
    """Steps from `start()` on; its length is the *whole* run's, as Lightning adds the steps done before a resume."""

    def __init__(self, num_steps: int, start: Callable[[], int]) -> None:
        self.num_steps, self.start = num_steps, start

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[int]:
        start = self.start()
        return iter(range(start, max(self.num_steps, start)))


class StepLoader:
    """Iterates over steps: a DataLoader whose rejections are logged here, in the main process, as steps are used.

    Not a DataLoader itself, so that Lightning never swaps its sampler; nothing starts before the first step is asked
    for, so that the start is read after a checkpoint has been restored.
    """

    def __init__(
        self,
        dataset: Dataset[Step],
        rejections: RejectionLog,
        *,
        num_steps: int,
        start: Callable[[], int] = lambda: 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
    ) -> None:
        self.num_steps, self.rejections, self.start = num_steps, rejections, start
        self.waited_seconds = 0.0  # that whoever iterates has waited for steps, all passes together
        streaming = isinstance(dataset, IterableDataset)
        self.loader: DataLoader[Step] = DataLoader(
            dataset,
            batch_size=None,
            sampler=None if streaming else StepSampler(num_steps, start),
            num_workers=num_workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # batch_size None hands over single items
            generator=torch.Generator().manual_seed(0),  # else each start draws from the global generator
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor if num_workers else None,
            worker_init_fn=_leave_signals_to_the_rank,
        )

    def __len__(self) -> int:
        return self.num_steps

    def state_dict(self) -> dict[str, int]:
        """Nothing that `start` does not know; a loader with this method is one that Lightning takes as resumable."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore: the position is the optimizer's."""

    def __iter__(self) -> Iterator[list[VLMBatch]]:
        remaining = self.num_steps - self.start()
        steps = iter(self.loader)
        try:
            while remaining > 0:
                began = time.perf_counter()
                step = next(steps, None)
                self.waited_seconds += time.perf_counter() - began
                if step is None:
                    return
                self.rejections.record(step.rejected, step.num_samples)  # of one step: nothing is fetched ahead of it
                if step.failure:
                    raise ValueError(step.failure)
                remaining -= 1
                yield step.batches
        finally:
            # ends the workers now: once garbage in a cycle, with an error's traceback, torch can no longer tell them to
            del steps


def _leave_signals_to_the_rank(worker: int) -> None:
    """A signal that announces the end reaches the whole process group; a rank without its workers could not save.

    A worker ends when its rank does, or says so.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(item: Step) -> Step:
    return item
