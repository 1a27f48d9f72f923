from __future__ import annotations

import dataclasses

import pytest
import torch

from moevlm.batch import DEFAULT_VIEW, IGNORE_INDEX, IMAGE_TOKEN_ID, EncodedSample, Record, Turn
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.images import ImageTransform
from tests.samples import image_bytes, small_processor

PROCESSOR = small_processor()
TWO_IMAGES = Record(
    "two", (Turn("user", "<image> or <image>?"), Turn("assistant", "red")), (image_bytes(1), image_bytes(2))
)
TEXT = Record("text", (Turn("user", "What?"), Turn("assistant", "grass")))
PAIR = dataclasses.replace(TEXT, key="pair", rejected_turns=(TEXT.turns[0], Turn("assistant", "blue")))


def test_sequences_stand_in_one_row_with_their_facts_counted() -> None:
    samples = [*PROCESSOR.encode(TWO_IMAGES, source=1), *PROCESSOR.encode(TEXT)]
    batch = pack(samples, position=12)
    assert batch.lengths == tuple(len(sample.input_ids) for sample in samples)
    assert batch.num_text_tokens == len(batch.input_ids) == sum(batch.lengths)
    assert batch.num_targets == int((batch.labels != IGNORE_INDEX).sum())
    assert batch.image_sequences == (0, 0)
    assert batch.images[DEFAULT_VIEW].shape == (2, 3, 8, 8)
    assert batch.sources.tolist() == [1, 0]
    assert batch.keys == ("two", "text")
    assert batch.position == 12
    assert batch.num_pairs == 0


def test_pairs_are_counted_and_told_apart() -> None:
    batch = pack([*PROCESSOR.encode(PAIR, pair_id=4), *PROCESSOR.encode(PAIR, pair_id=5)])
    assert batch.num_pairs == 2
    assert batch.pair_ids.tolist() == [4, 4, 5, 5]
    assert batch.is_chosen.tolist() == [True, False, True, False]


def test_a_text_only_batch_has_an_empty_image_tensor() -> None:
    assert pack(PROCESSOR.encode(TEXT)).images[DEFAULT_VIEW].shape == (0, 3, 8, 8)


def test_views_are_packed_side_by_side() -> None:
    both = PROCESSOR.with_view("teacher", ImageTransform(6))
    batch = pack([*both.encode(TEXT), *both.encode(TWO_IMAGES)])
    assert batch.images["teacher"].shape == (2, 3, 6, 6)
    assert batch.image_sequences == (1, 1)


def test_a_label_on_a_first_token_is_refused() -> None:
    ids = torch.tensor([5, 6])
    sample = EncodedSample("k", ids, ids, torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="no row predicts a first token"):
        pack([sample])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([IGNORE_INDEX])}, "2 tokens, 1 labels"),
        ({"images": {DEFAULT_VIEW: torch.zeros(2, 3, 8, 8)}}, "1 image placeholders, 2 images"),
        ({"images": {}}, "but no images"),
        ({"input_ids": torch.tensor([])}, "is empty"),
        ({"pair_id": 3}, "one chosen and one rejected"),
    ],
)
def test_a_sample_that_contradicts_itself_is_refused(changes: dict, message: str) -> None:
    sample = EncodedSample(
        "k",
        torch.tensor([IMAGE_TOKEN_ID, 6]),
        torch.tensor([IGNORE_INDEX, 6]),
        torch.tensor([0, 3]),
        {DEFAULT_VIEW: torch.zeros(1, 3, 8, 8)},
    )
    with pytest.raises(ValueError, match=message):
        pack([dataclasses.replace(sample, **changes)])


def test_an_empty_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        pack([])
