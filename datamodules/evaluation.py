"""Held-out records: in order, for perplexity and for generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datamodules.base import VLMDataModule
from datamodules.instructions import InstructionDataModule
from datamodules.rejections import RejectedDraw
from datamodules.steps import StepLoader
from moevlm.batch import Record
from moevlm.data.rejection import RejectedRecord
from moevlm.preprocessing.processor import Processor


class EvaluationDataModule(InstructionDataModule):
    """Evaluation sources, each ``{name, shards}`` or ``{name, json, image_folder}``; there is nothing to train on.

    Args:
        sources: the collections; one loader each, so that every one gets its own numbers.
        max_samples: of each source; None takes all.
        options: further arguments of `VLMDataModule` (num_workers, rejected_folder, rank, ...).
    """

    def __init__(
        self,
        sources: Iterable[Mapping[str, Any]],
        processor: Processor,
        *,
        micro_batch_size: int,
        max_samples: int | None = None,
        **options: Any,
    ) -> None:
        VLMDataModule.__init__(
            self,
            (),
            processor,
            num_steps=1,
            global_batch_size=micro_batch_size,
            micro_batch_size=micro_batch_size,
            validation_sources=sources,
            num_validation_samples=max_samples,
            **options,
        )
        if not self.validation_sources:
            raise ValueError("nothing to evaluate on; set data.sources")

    def _split_global_batch(self, world_size: int) -> None:
        """There is no global batch: nothing is trained."""

    def val_dataloader(self) -> list[StepLoader]:
        """One loader a source, in the order of `sources`."""
        return [self.sequential_loader([source], split=source.name) for source in self.validation_sources]

    def test_dataloader(self) -> list[StepLoader]:
        """The same as for validation."""
        return self.val_dataloader()

    def records(self, name: str) -> Iterator[Record]:
        """The raw records of a source, for generation; unusable ones are counted, and fatal past the limit.

        Raises:
            ValueError: an unknown source, or too many rejected.
        """
        known = {source.name: source for source in self.validation_sources}
        if name not in known:
            raise ValueError(f"no evaluation source {name!r}, known are {', '.join(known)}; set data.sources")
        reader, rejections = self._open(known[name]), self._rejections(name)
        count = len(reader) if self.num_validation_samples is None else min(len(reader), self.num_validation_samples)
        for number in range(count):
            try:
                record = reader.read(number)
            except RejectedRecord as rejected:
                draw = RejectedDraw(number, name, reader.name(number), rejected.reason, rejected.detail)
                rejections.record([draw], 1)
                continue
            rejections.record([], 1)
            yield record
