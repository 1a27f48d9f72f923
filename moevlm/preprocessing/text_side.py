"""A record between the two halves of its encoding: its turns are tokens, its images are still files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moevlm.batch import DEFAULT_VIEW, NO_PAIR, EncodedSample, PixelScale, Record, Tiling

if TYPE_CHECKING:
    from moevlm.preprocessing.processor import Processor

EncodedTurns = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]


class View(NamedTuple):
    """The images of a sample as one transform made them."""

    pixels: torch.Tensor  # [n, 3, H, W] uint8, or all pictures of n tiled images
    tilings: tuple[Tiling, ...] | None
    scale: PixelScale

    def num_pictures(self, num_images: int) -> int:
        """Of the first images."""
        return num_images if self.tilings is None else sum(tiling.num_tiles for tiling in self.tilings[:num_images])


@dataclass(frozen=True)
class TextSide:
    """A record whose turns are tokens and whose images are still files."""

    processor: Processor
    record: Record
    encoded: list[EncodedTurns]  # of the conversation, or of both sides of a pair
    source: int
    pair_id: int

    def with_images(self, features_MPD: Tensor | None = None, *, pixels: bool = True) -> list[EncodedSample]:
        """The record's sequences with their pixels: the costly half of `Processor.encode`.

        Args:
            features_MPD: what a frozen encoder makes of the record's pictures, from a cache.
            pixels: decode the images although there are features.

        Raises:
            RejectedSample: a reason of an image, or of a teacher's own tokenizer.
        """
        record = self.record
        if features_MPD is None or (record.images and not len(features_MPD)):  # an image that the cache could not use
            features_MPD, pixels = None, True
        views = self.processor.views_of(record.images) if pixels else {}
        tilings = {n: v.tilings for n, v in views.items() if v.tilings is not None}
        if not pixels and self.processor.image_transform.is_tiled:
            tilings[DEFAULT_VIEW] = self.processor.tilings_of(record.images)
        samples = [
            EncodedSample(
                record.key,
                ids_S,
                labels_S,
                segments_S,
                {name: view.pixels[: view.num_pictures(num_images)] for name, view in views.items()},
                self.source,
                self.pair_id,
                is_chosen=self.pair_id != NO_PAIR and number == 0,
                tilings={name: some[:num_images] for name, some in tilings.items()},
                scales={name: view.scale for name, view in views.items()},
                features={} if features_MPD is None else {DEFAULT_VIEW: features_MPD[: _pictures(num_images, tilings)]},
            )
            for number, (ids_S, labels_S, segments_S, num_images) in enumerate(self.encoded)
        ]
        return self.processor.with_teachers_side(samples, record, self.source, self.pair_id)


def _pictures(num_images: int, tilings: Mapping[str, Sequence[Tiling]]) -> int:
    """Pictures of the first images in the default view."""
    shown = tilings.get(DEFAULT_VIEW)
    return num_images if shown is None else sum(tiling.num_tiles for tiling in shown[:num_images])
