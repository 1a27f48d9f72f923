"""What a teacher cache depends on, and how its rows lie in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moevlm.batch import EncodedSample
from moevlm.data.sample_cache import Key

KINDS = ("top_k", "sampled", "hidden", "reference")
NO_TOKENS = 0
"""Token hash of a sample that could not be encoded."""


@dataclass(frozen=True)
class CacheKey(Key):
    """What a teacher's cached numbers depend on. A row is a supervised token, or of kind "reference" a sequence."""

    what: ClassVar[str] = "teacher"
    program: ClassVar[str] = "experiments.cache_teacher"
    kind: str  # top_k, sampled, hidden (rows of supervised tokens) or reference (a log-probability for each sequence)
    teacher: str  # hash of the model folder
    template: str  # hash of tokenizer and chat template
    image: str  # hash of the image transform that the teacher sees
    shards: str  # digest of the shard folder
    width: int = 1  # K of top_k, draws of sampled, hidden width
    vocab_size: int = 0  # columns of the teacher's logits that count; 0 for all
    proposal: float = 1.0  # sampled: tokens are drawn from p ** proposal, normalised
    dtype: str = "float16"  # of stored log-probabilities or hidden states: float32, float16, and bfloat16 for hidden
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a cache's kind must be one of {', '.join(KINDS)}, got {self.kind!r}; set teacher_cache")
        if self.width < 1:
            raise ValueError(f"a cache's width must be at least 1, got {self.width}; set data.teacher_cache.width")
        if self.dtype not in ("float32", "float16", *(["bfloat16"] if self.kind == "hidden" else [])):
            raise ValueError(f"a {self.kind} cache cannot store {self.dtype}; set data.teacher_cache.dtype")

    @property
    def fields(self) -> list[tuple[str, str, int]]:
        """(field, numpy dtype, width) of a row, in the order in which they lie in the file."""
        if self.kind == "top_k":
            return [
                ("token_ids", "<i4", self.width),
                ("values", {"float16": "<f2", "float32": "<f4"}[self.dtype], self.width),
                ("tail_log_probs", "<f4", 1),
            ]
        if self.kind == "sampled":
            return [("token_ids", "<i4", self.width), ("values", "<f4", self.width), ("entropies", "<f4", 1)]
        if self.kind == "hidden":
            stored = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2"}[self.dtype]  # numpy has no bfloat16
            return [("hidden_states", stored, self.width)]
        return [("log_probs", "<f4", 1)]


def hash_model_folder(folder: str | Path) -> str:
    """Of a model folder's config and weights, as they are on disk.

    Raises:
        ValueError: no model folder.
    """
    weights = sorted(Path(folder).glob("*.safetensors"))
    config = Path(folder) / "config.json"
    if not config.is_file() or not weights:
        raise ValueError(
            f"no model folder at {folder}: config.json or *.safetensors is missing; set the cache's teacher"
        )
    digest = hashlib.sha256()
    for path in (config, *weights):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hash_values(values: Mapping[str, Any]) -> str:
    """Of plain settings, such as those of an image transform."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def token_hash(samples: Sequence[EncodedSample]) -> int:
    """64 bits that name the token ids and labels of a sample's sequences; never NO_TOKENS."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.input_ids.numpy().tobytes() + b"|" + sample.labels.numpy().tobytes() + b";")
    return int.from_bytes(digest.digest()[:8], "little") or 1
