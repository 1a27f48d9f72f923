from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moevlm.data.lengths import UNUSABLE, lengths_path, read_lengths, write_lengths
from tests.samples import llava_record, make_shards, small_processor

RECORDS = [llava_record(number) for number in range(6)]


def test_lengths_are_read_back_for_their_tokenizer_and_template(tmp_path: Path) -> None:
    shards, processor = make_shards(tmp_path, RECORDS), small_processor()
    written = write_lengths(shards, processor.count_tokens, processor.token_hash())
    stored = read_lengths(shards, processor.token_hash())
    assert stored.text_tokens.tolist() == written.text_tokens.tolist()
    assert stored.num_images.tolist() == [1, 1, 1, 1, 0, 1]
    assert (stored.spliced(9) - stored.text_tokens).tolist() == [9, 9, 9, 9, 0, 9]
    with pytest.raises(ValueError, match="no lengths for this tokenizer"):
        read_lengths(shards, small_processor("vicuna_v1").token_hash())


def test_samples_that_cannot_be_encoded_are_marked(tmp_path: Path) -> None:
    shards, processor = make_shards(tmp_path, RECORDS), small_processor("plain")
    lengths = write_lengths(shards, processor.count_tokens, processor.token_hash())
    assert lengths.text_tokens[4] == UNUSABLE
    assert lengths.spliced(9)[4] == UNUSABLE


def test_lengths_of_another_build_are_refused(tmp_path: Path) -> None:
    processor = small_processor()
    old, new = make_shards(tmp_path / "old", RECORDS), make_shards(tmp_path / "new", RECORDS[:3])
    write_lengths(old, processor.count_tokens, processor.token_hash())
    stale = lengths_path(new, processor.token_hash())
    shutil.copy(lengths_path(old, processor.token_hash()), stale)
    with pytest.raises(ValueError, match="build of the shards"):
        read_lengths(new, processor.token_hash())
    stale.write_bytes(b"junk")
    with pytest.raises(ValueError, match="is broken"):
        read_lengths(new, processor.token_hash())
