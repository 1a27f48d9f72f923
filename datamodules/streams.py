"""Steps from streamed shards: for remote data without an index, where exact positions are not to be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.utils.data
from torch.utils.data import IterableDataset

from datamodules.rejections import RejectedDraw
from datamodules.sources import Source
from datamodules.steps import Encode, Step, pack_groups
from moevlm.batch import EncodedSample, Record
from moevlm.data.plan import MIXTURE_BLOCK, MIXTURE_STREAM, SHARD_STREAM, mixture_slots, random_order, random_words
from moevlm.data.rejection import Rejection
from moevlm.data.streaming import stream
from moevlm.data.urls import expand_urls
from moevlm.preprocessing.rejection import RejectedSample

MAX_REJECTED_IN_A_ROW = 1000


class StreamingSteps(IterableDataset[Step]):
    """Endless steps of one rank. Shards are in a new order every pass, samples keep their order within a shard.

    Workers take steps by turns (worker w makes steps w, w + n, ...), so every step has its place; which samples it
    holds depends on ranks and workers, other than with indexed shards.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Encode,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start: int = 0,
        allow_pipe: bool = False,
    ) -> None:
        self.names = [source.name for source in sources]
        self.urls = [expand_urls(source.shards, allow_pipe=allow_pipe) for source in sources]
        self.slots = mixture_slots([source.weight or len(urls) for source, urls in zip(sources, self.urls)])
        self.encode, self.seed, self.start = encode, seed, start
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Step]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        streams = [self._endless(source, worker, num_workers) for source in range(len(self.urls))]
        number = self.start + worker
        while True:
            step = self._fill(streams, number, worker)
            yield step
            if step.failure:
                return
            number += num_workers

    def _fill(self, streams: list[Iterator[Record | Rejection]], number: int, worker: int) -> Step:
        step, groups = Step(), []
        first = number * self.global_batch_size
        try:
            for position in range(first + self.rank, first + self.global_batch_size, self.world_size):
                word = int(random_words(1, self.seed, MIXTURE_STREAM, position)[0]) % MIXTURE_BLOCK
                source = next(n for n in range(len(self.slots)) if word < sum(self.slots[: n + 1]))
                groups.append(self._next(streams[source], source, position, step))
            step.batches = pack_groups(groups, self.micro_batch_size, first)
        except (ValueError, OSError) as error:
            step.failure = str(error)
        step.num_samples = len(groups)
        return step

    def _next(
        self, records: Iterator[Record | Rejection], source: int, position: int, step: Step
    ) -> list[EncodedSample]:
        name = self.names[source]
        for _ in range(MAX_REJECTED_IN_A_ROW):
            record = next(records)
            if isinstance(record, Rejection):
                step.rejected.append(RejectedDraw(position, name, record.key, record.reason, record.detail))
                continue
            try:
                return self.encode(record, source, position).with_images()
            except RejectedSample as rejected:
                step.rejected.append(RejectedDraw(position, name, record.key, rejected.reason, rejected.detail))
        last = step.rejected[-1]
        raise ValueError(
            f"source {name}: {MAX_REJECTED_IN_A_ROW} samples in a row are unusable, the last {last.key} ({last.reason})"
        )

    def _endless(self, source: int, worker: int, num_workers: int) -> Iterator[Record | Rejection]:
        urls, epoch = self.urls[source], 0
        while True:
            order = random_order(len(urls), self.seed, SHARD_STREAM, source, epoch, self.start)
            shuffled = [urls[number] for number in order]
            count = 0
            for record in stream(
                shuffled, rank=self.rank, world_size=self.world_size, worker=worker, num_workers=num_workers
            ):
                count += 1
                yield record
            if not count:
                raise ValueError(f"source {self.names[source]}: the shards hold no sample; check its URLs")
            epoch += 1
