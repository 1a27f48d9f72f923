"""Vision caches beside the shards: which ones a run needs, and a sample's features from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from datamodules.sources import Source, folder_of
from moevlm.data.cache_key import hash_values
from moevlm.data.reader import IndexedShards
from moevlm.data.vision_cache import VisionCache, VisionKey
from moevlm.evaluation.vision_caching import VisionRequest
from moevlm.models.vision_weights import hash_encoder, load_encoder
from moevlm.preprocessing.processor import Processor

Features = Callable[[int, int, str], Tensor]
"""(source, number in the source, key) -> [M, P, width] of the sample's pictures."""

SETTINGS = ("enabled", "vision_encoder", "weights", "dtype", "pixels")


class VisionCaches:
    """The features of a run's images, in place of their pixels or beside them.

    Args:
        settings: ``enabled``; ``vision_encoder`` and ``weights``, the model's; ``dtype`` of what is stored (float16);
            ``pixels``: decode the images as well, for a teacher with an encoder of its own. None for no cache.
    """

    def __init__(self, settings: Mapping[str, Any] | None, processor: Processor) -> None:
        given = dict(settings or {})
        unknown = sorted(set(given) - set(SETTINGS))
        if unknown:
            raise ValueError(f"data.vision_cache has unknown keys {unknown}, known are {', '.join(SETTINGS)}")
        self.is_used = bool(given and given.get("enabled", True))
        self.pixels = bool(given.get("pixels", False)) or not self.is_used
        self.source = (given.get("vision_encoder"), given.get("weights"))
        self.dtype, self.transform = given.get("dtype") or "float16", processor.image_transform
        others = processor.extra_views or processor.teacher is not None
        if not self.pixels and others:
            raise ValueError(
                "a teacher sees these images otherwise and needs their pixels; set data.vision_cache.pixels=true, or "
                "data.vision_cache.enabled=false"
            )
        self._facts: tuple[str, int, int] | None = None
        self._opened: dict[str, VisionCache] = {}

    @property
    def provides(self) -> frozenset[str]:
        """ "vision:<hash of the encoder>", for the stage to compare with its model's."""
        return frozenset({f"vision:{self._encoder_facts()[0]}"} if self.is_used else ())

    def requests(self, sources: Sequence[Source]) -> list[VisionRequest]:
        """Every cache that these sources need, each once."""
        folders = dict.fromkeys(folder_of(source) for source in sources) if self.is_used else {}
        return [
            VisionRequest(folder, self._key(folder), partial(load_encoder, *self.source), self.transform)
            for folder in folders
        ]

    def open(self, sources: Sequence[Source]) -> Features | None:
        """Open and check the caches of these sources; None when the run uses none.

        Raises:
            ValueError: one is missing, of other settings, or damaged.
        """
        if not self.is_used:
            return None
        for request in self.requests(sources):
            if request.shards not in self._opened:
                self._opened[request.shards] = VisionCache(request.shards, request.key)
        return _Features([self._opened[folder_of(source)] for source in sources])

    def _key(self, shards: str) -> VisionKey:
        name, num_tokens, width = self._encoder_facts()
        return VisionKey(
            name, hash_values(self.transform.to_dict()), IndexedShards(shards).digest, num_tokens, width, self.dtype
        )

    def _encoder_facts(self) -> tuple[str, int, int]:
        """Hash, tokens and width of the encoder; it is read once."""
        if self._facts is None:
            encoder = load_encoder(*self.source)
            self._facts = hash_encoder(encoder), encoder.num_tokens, encoder.width
        return self._facts


class _Features:
    """Travels to loader workers."""

    def __init__(self, caches: Sequence[VisionCache]) -> None:
        self.caches = list(caches)  # one for each source

    def __call__(self, source: int, number: int, name: str) -> Tensor:
        return self.caches[source].features(number, name)
