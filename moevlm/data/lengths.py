"""Token lengths beside the shards: computed once, valid for one tokenizer and template.

Text tokens and images are stored apart, so that a model with another number of visual tokens reads the same file.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moevlm.batch import Record
from moevlm.data.reader import IndexedShards

UNUSABLE = -1
"""Text tokens of a sample that cannot be encoded."""


@dataclass(frozen=True)
class Lengths:
    """By sample number."""

    text_tokens: np.ndarray  # [n] int32, images not counted; UNUSABLE where a sample cannot be encoded
    num_images: np.ndarray  # [n] int16

    def spliced(self, num_visual_tokens: int) -> np.ndarray:
        """[n] tokens in the decoder's row when every image takes `num_visual_tokens`."""
        total = self.text_tokens + self.num_images.astype(np.int32) * num_visual_tokens
        return np.where(self.text_tokens == UNUSABLE, UNUSABLE, total)


def lengths_path(folder: str | Path, token_hash: str) -> Path:
    """The file of one tokenizer and template; ``token_hash`` is `Processor.token_hash()`."""
    return Path(folder) / f"lengths_{token_hash[:16]}.npz"


def write_lengths(
    folder: str | Path,
    count_tokens: Callable[[Record], tuple[int, int]],
    token_hash: str,
    *,
    progress: Callable[[], object] = lambda: None,
) -> Lengths:
    """Count every sample of a shard folder and store the result.

    Args:
        count_tokens: record -> (text tokens, images), as `Processor.count_tokens`; a ValueError marks it unusable.
    """
    shards = IndexedShards(folder)
    counts = []
    for number in range(len(shards)):
        try:
            counts.append(count_tokens(shards.read(number)))
        except ValueError:
            counts.append((UNUSABLE, 0))
        progress()
    lengths = _from_counts(counts)
    path = lengths_path(folder, token_hash)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            text_tokens=lengths.text_tokens,
            num_images=lengths.num_images,
            token_hash=np.array(token_hash),
            digest=np.array(shards.digest),
        )
    os.replace(temporary, path)  # noqa: PTH105 - the atomic rename is the point
    return lengths


def read_lengths(folder: str | Path, token_hash: str) -> Lengths:
    """The stored lengths.

    Raises:
        ValueError: there are none for this tokenizer and template, or the shards have been built anew since.
    """
    path = lengths_path(folder, token_hash)
    try:
        with np.load(path, allow_pickle=False) as stored:
            saved_hash, digest = str(stored["token_hash"]), str(stored["digest"])
            lengths = Lengths(stored["text_tokens"], stored["num_images"])
    except FileNotFoundError:
        raise ValueError(f"no lengths for this tokenizer and template in {folder}; write_lengths makes them") from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is broken ({error}); delete it and run write_lengths again") from None
    if saved_hash != token_hash or digest != IndexedShards(folder).digest:
        raise ValueError(
            f"{path} belongs to another tokenizer, template or build of the shards; run write_lengths again"
        )
    return lengths


def _from_counts(counts: Sequence[tuple[int, int]]) -> Lengths:
    table = np.array(counts, dtype=np.int64).reshape(-1, 2)
    return Lengths(table[:, 0].astype(np.int32), table[:, 1].astype(np.int16))
