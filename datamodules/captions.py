"""Captions: one image, one request, one description."""

from __future__ import annotations

from functools import partial

from datamodules.base import VLMDataModule
from datamodules.steps import Encode
from moevlm.batch import Record
from moevlm.preprocessing.processor import Processor
from moevlm.preprocessing.rejection import RejectedSample
from moevlm.preprocessing.text_side import TextSide


class CaptionDataModule(VLMDataModule):
    """Single-round records with images, for connector alignment; others are rejected as `not_a_caption`."""

    def encoder(self) -> Encode:
        """One sequence a record."""
        return partial(encode_caption, self.processor)


def encode_caption(processor: Processor, record: Record, source: int, number: int) -> TextSide:
    """An image's caption; with the `plain` template the request is dropped."""
    answers = sum(turn.role == "assistant" for turn in record.turns)
    if answers != 1 or not record.images:
        raise RejectedSample(
            "not_a_caption", f"{len(record.images)} images, {answers} answers; a caption has one answer"
        )
    return processor.encode_text(record, source=source)
