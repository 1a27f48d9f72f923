"""Teacher caches beside the shards: which ones a run needs, and how a sample gets what they hold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.sources import Source, folder_of
from moevlm.batch import DEFAULT_VIEW, TEACHER_VIEW, EncodedSample
from moevlm.data.cache_key import CacheKey, hash_model_folder, hash_values
from moevlm.data.reader import IndexedShards
from moevlm.data.teacher_cache import TeacherCache
from moevlm.evaluation.teacher_caching import CacheRequest
from moevlm.losses.references import REFERENCES
from moevlm.preprocessing.processor import Processor

Attach = Callable[[list[EncodedSample], int, int], list[EncodedSample]]
"""(a sample's sequences, source, number in the source) -> the same with what the caches hold."""

SETTINGS = ("teacher", "kind", "width", "proposal", "dtype", "seed", "vocab_size")


def check_cache_settings(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Refuse unknown keys and settings without a teacher's folder or a kind; null values take their defaults."""
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    unknown = sorted(set(given) - set(SETTINGS))
    if unknown:
        raise ValueError(f"data.teacher_cache has unknown keys {unknown}, known are {', '.join(SETTINGS)}")
    if given and ("teacher" not in given or given.get("kind") not in ("top_k", "sampled", "hidden")):
        raise ValueError(
            "data.teacher_cache needs teacher (a model folder) and kind (top_k, sampled or hidden), got "
            f"{settings}; set them, or data.teacher_cache=null"
        )
    return given


def row_request(shards: str, settings: Mapping[str, Any], processor: Processor) -> CacheRequest:
    """The cache of teacher rows that these settings name."""
    given = dict(settings)
    model, kind = str(given.pop("teacher")), given["kind"]
    if kind == "hidden":
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        given["width"] = config["language_model"]["hidden_size"]
    elif "width" not in given:
        raise ValueError(
            f"a {kind} cache needs width, the number of tokens kept of a row; set data.teacher_cache.width"
        )
    if kind != "hidden":
        given.setdefault("vocab_size", len(processor.tokenizer))
    return CacheRequest(shards, _key(shards, model, processor, TEACHER_VIEW, **given), model, processor)


def reference_request(shards: str, name: str, model: str, processor: Processor) -> CacheRequest:
    """The cache of a reference's log-probabilities: one number for each answer of a pair."""
    view = DEFAULT_VIEW if name == "self" else TEACHER_VIEW
    key = _key(shards, model, processor, view, kind="reference", dtype="float32")
    return CacheRequest(shards, key, model, processor, view)


class SampleCaches:
    """The caches of a run: teacher rows of supervised tokens, references' log-probabilities of preference pairs.

    Args:
        teacher_cache: ``{teacher: folder, kind, width, ...}``; None for none.
        references: name ("teacher", "self") -> model folder.
        processor: with the teacher's view, where that differs.
    """

    def __init__(
        self, teacher_cache: Mapping[str, Any] | None, references: Mapping[str, str] | None, processor: Processor
    ) -> None:
        self.rows, self.references = check_cache_settings(teacher_cache), dict(references or {})
        self.processor = processor
        self._opened: dict[tuple[str, CacheKey], TeacherCache] = {}

    @property
    def provides(self) -> frozenset[str]:
        """What its batches carry: "rows:<kind>" and "reference:<name>"; a stage need not build those models."""
        rows = {f"rows:{self.rows['kind']}"} if self.rows else set()
        return frozenset(rows | {f"reference:{name}" for name in self.references})

    def requests(self, sources: Sequence[Source]) -> list[CacheRequest]:
        """Every cache that these sources need, each once."""
        found = {(one.shards, one.key): one for made in self._by_name(sources).values() for one in made}
        return list(found.values())

    def open(self, sources: Sequence[Source]) -> Attach | None:
        """Open and check the caches of these sources; None when the run uses none.

        Raises:
            ValueError: one is missing, of other settings, or damaged.
        """
        opened = {name: [self._open(request) for request in made] for name, made in self._by_name(sources).items()}
        return _Attach(opened) if opened else None

    def _by_name(self, sources: Sequence[Source]) -> dict[str, list[CacheRequest]]:
        made: dict[str, list[CacheRequest]] = {}
        if self.rows:
            made[""] = [row_request(folder_of(source), self.rows, self.processor) for source in sources]
        for name, model in self.references.items():
            made[name] = [reference_request(folder_of(source), name, model, self.processor) for source in sources]
        return made

    def _open(self, request: CacheRequest) -> TeacherCache:
        key = (request.shards, request.key)
        if key not in self._opened:
            self._opened[key] = TeacherCache(*key)
        return self._opened[key]


class _Attach:
    """Gives a sample what the caches hold; travels to loader workers."""

    def __init__(self, caches: Mapping[str, Sequence[TeacherCache]]) -> None:
        self.caches = caches  # "" for the rows, else the name of a reference; then one for each source

    def __call__(self, samples: list[EncodedSample], source: int, number: int) -> list[EncodedSample]:
        log_probs: dict[str, list[float]] = {}
        for name, of_source in self.caches.items():
            if name:
                log_probs[name] = of_source[source].log_probs(number, samples)
            else:
                samples = of_source[source].attach(number, samples)
        return [
            dataclasses.replace(one, reference_log_probs={name: values[row] for name, values in log_probs.items()})
            for row, one in enumerate(samples)
        ]


def references_of(use: str | None, folders: Mapping[str, str | None]) -> dict[str, str]:
    """The models whose log-probabilities ``stage.reference`` needs, of those that have a folder to be named by."""
    names = REFERENCES.get(use or "", ())
    return {name: str(folders[name]) for name in names if folders.get(name) is not None}


def _key(shards: str, model: str, processor: Processor, view: str, **settings: Any) -> CacheKey:
    transform = processor.extra_views.get(view, processor.image_transform)
    return CacheKey(
        teacher=_model_hash(model),
        template=processor.token_hash(),
        image=hash_values(transform.to_dict()),
        shards=IndexedShards(shards).digest,
        **settings,
    )


_HASHES: dict[tuple[str, float], str] = {}


def _model_hash(model: str) -> str:
    """Read once in a process: weights are large."""
    config = Path(model) / "config.json"
    key = (model, config.stat().st_mtime if config.is_file() else 0.0)
    if key not in _HASHES:
        _HASHES[key] = hash_model_folder(model)
    return _HASHES[key]
