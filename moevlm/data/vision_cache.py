"""What a frozen vision encoder makes of every image of a shard folder: ``<shards>/vision_<key>/``, see `SampleCache`.

A row is a picture: an image, or of a tiled one its overview and each tile, in the order of the record's images.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moevlm.data.sample_cache import Key, SampleCache

STORED = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2"}  # numpy has no bfloat16


@dataclass(frozen=True)
class VisionKey(Key):
    """What features depend on."""

    what: ClassVar[str] = "vision"
    program: ClassVar[str] = "experiments.cache_vision"
    encoder: str  # hash of weights, architecture and feature layer
    image: str  # hash of the image transform
    shards: str  # digest of the shard folder
    num_tokens: int  # of a picture
    width: int  # of a token
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in STORED:
            known = ", ".join(STORED)
            raise ValueError(
                f"a vision cache's dtype must be one of {known}, got {self.dtype!r}; set data.vision_cache.dtype"
            )

    @property
    def fields(self) -> list[tuple[str, str, int]]:
        return [("features", STORED[self.dtype], self.num_tokens * self.width)]


class VisionCache(SampleCache):
    """Features by the sample's number."""

    key: VisionKey

    def features(self, number: int, name: str) -> Tensor:
        """[M, P, width] of the pictures of a sample; M is 0 without images, or where one could not be used.

        Raises:
            ValueError: another sample was cached under this number, or the file ends early.
        """
        stored = self._read(number, name_hash(name), name)["features"].copy()
        rows = torch.from_numpy(stored).view(-1, self.key.num_tokens, self.key.width)
        return rows.view(torch.bfloat16) if self.key.dtype == "bfloat16" else rows


def name_hash(name: str) -> int:
    """64 bits that name a sample's key; its images are named by the digest of the shards."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") or 1
