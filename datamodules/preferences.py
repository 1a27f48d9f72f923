"""Preference pairs: two answers to one question, the chosen and the rejected."""

from __future__ import annotations

from functools import partial

from datamodules.base import VLMDataModule
from datamodules.steps import Encode
from moevlm.batch import EncodedSample, Record
from moevlm.preprocessing.processor import Processor


class PreferenceDataModule(VLMDataModule):
    """A pair is one sample and two sequences of the same micro-batch; other records are rejected as `not_a_pair`."""

    def encoder(self) -> Encode:
        """Two sequences a record."""
        return partial(encode_pair, self.processor)


def encode_pair(processor: Processor, record: Record, source: int, number: int) -> list[EncodedSample]:
    """Chosen and rejected, under the pair id `number`, the position of the draw."""
    return processor.encode(record, source=source, pair_id=number)
