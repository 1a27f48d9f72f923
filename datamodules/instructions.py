"""Visual instructions: conversations about any number of images, or none."""

from __future__ import annotations

from functools import partial

from datamodules.base import VLMDataModule
from datamodules.steps import Encode
from moevlm.batch import Record
from moevlm.preprocessing.processor import Processor
from moevlm.preprocessing.text_side import TextSide


class InstructionDataModule(VLMDataModule):
    """Whole conversations; of a preference record, the chosen one."""

    def encoder(self) -> Encode:
        """One sequence a record."""
        return partial(encode_conversation, self.processor)


def encode_conversation(processor: Processor, record: Record, source: int, number: int) -> TextSide:
    """The conversation of a record, whatever its place in the plan (`number`)."""
    return processor.encode_text(record, source=source)
