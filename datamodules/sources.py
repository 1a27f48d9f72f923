"""Data sources as a config names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moevlm.data.cache import ShardCache
from moevlm.data.reader import IndexedShards
from moevlm.data.records import RecordFile
from moevlm.data.remote import open_shards

KEYS = ("name", "shards", "weight", "epochs", "tokens", "json", "image_folder", "key_from")


@dataclass(frozen=True)
class Source:
    """One collection: `shards` (a folder of build_shards, tars, URLs when streamed), or `json` with `image_folder`."""

    name: str
    shards: Any = None
    weight: float | None = None  # share in the mixture; None: its number of samples
    epochs: float | None = None  # instead of weight: passes over it for each pass over a source of 1
    tokens: float | None = None  # instead of weight: its part of the tokens of the run
    json: str | None = None
    image_folder: str | None = None
    key_from: str = "id"

    def open(self, cache: ShardCache | None = None) -> IndexedShards | RecordFile:
        """A reader of its records by number; shards at URLs come through the cache."""
        if self.json is not None:
            return RecordFile(self.json, self.image_folder, key_from=self.key_from)
        try:
            return open_shards(self.shards, cache)
        except ValueError as error:
            raise ValueError(f"source {self.name}: {error}") from None


def parse_sources(sources: Iterable[Mapping[str, Any]], key: str) -> list[Source]:
    """Check a config's list of sources; `key` is the name of that list, for messages."""
    parsed = []
    for number, values in enumerate(sources):
        unknown = sorted(set(values) - set(KEYS))
        if unknown:
            raise ValueError(f"{key}[{number}] has unknown keys {unknown}, known are {', '.join(KEYS)}")
        if (values.get("shards") is None) == (values.get("json") is None):
            raise ValueError(f"{key}[{number}] needs either shards or json")
        parsed.append(Source(**{"name": f"source_{number}", **values}))
    names = [source.name for source in parsed]
    if len(set(names)) != len(names):
        raise ValueError(f"{key} repeats a name: {', '.join(names)}")
    return parsed


def folder_of(source: Source) -> str:
    """The shard folder that a cache lies beside.

    Raises:
        ValueError: the source is no folder of shards.
    """
    if not isinstance(source.shards, (str, Path)) or not Path(source.shards).is_dir():
        raise ValueError(
            f"source {source.name} is no shard folder, and a cache lies beside one; build_shards makes it, or "
            "set data.teacher_cache=null, data.vision_cache=null and data.reference=null"
        )
    return str(source.shards)
