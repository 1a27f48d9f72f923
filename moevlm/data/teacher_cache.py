"""What a frozen model said of every sample of a shard folder: ``<shards>/teacher_<key>/``, see `SampleCache`.

The key names everything that the numbers depend on (teacher, template, image transform, shards, settings); each
sample's token ids are hashed.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import torch

from moevlm.batch import IGNORE_INDEX, CachedRows, EncodedSample
from moevlm.data.cache_key import CacheKey, token_hash
from moevlm.data.sample_cache import SampleCache, Values


class TeacherCache(SampleCache):
    """Rows of supervised tokens, or log-probabilities of sequences."""

    key: CacheKey

    def attach(self, number: int, samples: Sequence[EncodedSample]) -> list[EncodedSample]:
        """The sample's sequences with what the teacher said of them.

        Raises:
            ValueError: the tokens are not those that the teacher saw, or the file ends early.
        """
        rows, attached, start = self._rows(self._of(number, samples)), [], 0
        for sample in samples:
            part = slice(start, start + int((sample.labels != IGNORE_INDEX).sum()))
            attached.append(dataclasses.replace(sample, cached_rows=rows.map(operator.itemgetter(part))))
            start = part.stop
        return attached

    def log_probs(self, number: int, samples: Sequence[EncodedSample]) -> list[float]:
        """Kind "reference": the log-probability of each of the sample's sequences."""
        return [float(value) for value in self._of(number, samples)["log_probs"][:, 0]]

    def stale(self, name: str) -> str:
        """What differs are the tokens, as the shards are the same."""
        return (
            f"the teacher cache {self.folder} is stale: sample {name} had other token ids when it was written "
            f"(processor.max_length, overlong or the data changed); {self.key.again}"
        )

    def _of(self, number: int, samples: Sequence[EncodedSample]) -> Values:
        return self._read(number, token_hash(samples), samples[0].key)

    def _rows(self, values: Values) -> CachedRows:
        tensors = {name: torch.from_numpy(array.copy()) for name, array in values.items()}
        for name in ("tail_log_probs", "entropies"):
            if name in tensors:
                tensors[name] = tensors[name].squeeze(1)
        if "token_ids" in tensors:
            tensors["token_ids"], tensors["values"] = tensors["token_ids"].long(), tensors["values"].float()
        if self.key.dtype == "bfloat16":
            tensors["hidden_states"] = tensors["hidden_states"].view(torch.bfloat16)
        return CachedRows(self.key.kind, **tensors)
