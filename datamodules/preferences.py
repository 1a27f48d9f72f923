"""Preference pairs: two answers to one question, the chosen and the rejected."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from datamodules.base import VLMDataModule
from datamodules.caches import SampleCaches, references_of
from datamodules.steps import Encode
from moevlm.batch import Record
from moevlm.preprocessing.processor import Processor
from moevlm.preprocessing.text_side import TextSide


class PreferenceDataModule(VLMDataModule):
    """A pair is one sample and two sequences of the same micro-batch; other records are rejected as `not_a_pair`.

    Args:
        reference: what the stage measures the policy against: "teacher", "self" or "blend".
        references: model folder of "teacher" and of "self"; those that `reference` needs and that have a folder are
            read from caches, two numbers a pair, so that no stage runs them.
        options: further arguments of `VLMDataModule`.
    """

    def __init__(
        self,
        *arguments: Any,
        reference: str | None = None,
        references: Mapping[str, str | None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.caches = SampleCaches(None, references_of(reference, references or {}), self.processor)

    sequences_per_sample = 2

    def encoder(self) -> Encode:
        """Two sequences a record."""
        return partial(encode_pair, self.processor)


def encode_pair(processor: Processor, record: Record, source: int, number: int) -> TextSide:
    """Chosen and rejected, under the pair id `number`, the position of the draw."""
    return processor.encode_text(record, source=source, pair_id=number)
