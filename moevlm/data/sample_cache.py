"""Numbers of every sample of a shard folder, kept beside its shards: ``<shards>/<what>_<key>/``.

One ``.rows`` file for each tar, with an index: a sample is one seek away, like its images. The key names everything
that the numbers depend on; each sample has a hash of its own beside its rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moevlm.data.reader import IndexedShards

Values = dict[str, np.ndarray]
"""Field -> [R, width]; R rows of a sample."""


FORMAT = 1


class Key:
    """What cached numbers depend on; a child is a frozen dataclass of plain values."""

    what: ClassVar[str]  # names the folders, and the cache in messages: "teacher"
    program: ClassVar[str]  # what writes it

    @property
    def fields(self) -> list[tuple[str, str, int]]:
        """(field, numpy dtype, width) of a row, in the order in which they lie in the file."""
        raise NotImplementedError

    @property
    def values(self) -> dict[str, Any]:
        """The fields of the dataclass."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @property
    def row_bytes(self) -> int:
        return sum(np.dtype(dtype).itemsize * width for _, dtype, width in self.fields)

    @property
    def title(self) -> str:
        """For messages."""
        kind = self.values.get("kind")
        return f"{self.what} cache" + ("" if kind is None else f" of kind {kind}")

    @property
    def again(self) -> str:
        """What to do about a cache that does not fit."""
        return f"run {self.program} again"

    def folder(self, shards: str | Path) -> Path:
        """Where it lies, beside the shards."""
        text = json.dumps([FORMAT, self.values], sort_keys=True)
        return Path(shards) / f"{self.what}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def write_cache(
    shards: str | Path,
    key: Key,
    values_of: Callable[[int], Iterable[tuple[int, Values]]],
    *,
    part: int = 0,
    num_parts: int = 1,
    notes: Mapping[str, Any] | None = None,
) -> bool:
    """Write what is not there yet, tar by tar; each file appears under its name only when complete.

    Args:
        values_of: number of a tar -> (hash, values) of each of its samples, in order.
        part, num_parts: this call writes tars ``part, part + num_parts, ...``; calls may run on several machines.
        notes: what else the manifest says (seconds, teacher folder).

    Returns:
        Whether the cache is now complete: then its manifest is written.

    Raises:
        ValueError: the parts do not fit.
    """
    if not 0 <= part < num_parts:
        raise ValueError(f"part must lie in [0, num_parts={num_parts}), got {part}; set part")
    reader, folder = IndexedShards(shards), key.folder(shards)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{tar.stem}.rows" for tar in reader.tars]
    for number in range(part, len(files), num_parts):
        if not _index_of(files[number]).exists():
            _write_tar(files[number], key, values_of(number), reader.sizes[number])
    if not all(_index_of(file).exists() for file in files):
        return False
    listed = [{"file": file.name, "num_bytes": file.stat().st_size} for file in files]
    manifest = {"format": FORMAT, "key": key.values, "notes": dict(notes or {}), "files": listed}
    temporary = folder / "manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "manifest.json")  # noqa: PTH105 - the atomic rename is the point
    return True


class SampleCache:
    """The cache of one shard folder, opened and checked; read by the sample's number in that folder.

    Raises:
        ValueError: there is none with this key (the message says what the ones there differ in), or a file is missing
            or shorter than when it was written.
    """

    def __init__(self, shards: str | Path, key: Key) -> None:
        self.key, self.folder = key, key.folder(shards)
        manifest_file = self.folder / "manifest.json"
        if not manifest_file.is_file():
            raise ValueError(_no_cache(Path(shards), key))
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        self.files = [self.folder / entry["file"] for entry in manifest["files"]]
        for file, entry in zip(self.files, manifest["files"]):
            size = file.stat().st_size if file.is_file() else 0
            if size != entry["num_bytes"]:
                raise ValueError(
                    f"cached shard {file} has {size} bytes, not {entry['num_bytes']}; delete it and {key.again}"
                )
        self.sizes = IndexedShards(shards).sizes
        self._ends = np.cumsum(self.sizes)
        self._indexes: dict[int, Values] = {}
        self._descriptors: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def _read(self, number: int, hashed: int, name: str) -> Values:
        tar = int(np.searchsorted(self._ends, number, side="right"))
        local = number - int(self._ends[tar]) + self.sizes[tar]
        index = self._index(tar)
        if int(index["token_hashes"][local]) != hashed:
            raise ValueError(self.stale(name))
        start, count = int(index["starts"][local]), int(index["counts"][local])
        data = os.pread(self._descriptor(tar), count * self.key.row_bytes, start)
        if len(data) != count * self.key.row_bytes:
            raise ValueError(
                f"cached shard {self.files[tar]} ends inside sample {name}; delete it and {self.key.again}"
            )
        values, offset = {}, 0
        for field, dtype, width in self.key.fields:
            values[field] = np.frombuffer(data, dtype, count * width, offset).reshape(count, width)
            offset += values[field].nbytes
        return values

    def stale(self, name: str) -> str:
        """What to say of a sample that is not the one that was cached."""
        return f"the {self.key.what} cache {self.folder} is stale: sample {name} is another now; {self.key.again}"

    def _index(self, tar: int) -> Values:
        if tar not in self._indexes:
            path = _index_of(self.files[tar])
            try:
                with np.load(path, allow_pickle=False) as stored:
                    self._indexes[tar] = {name: stored[name] for name in ("starts", "counts", "token_hashes")}
            except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
                raise ValueError(f"{path} is missing or broken ({error}); delete it and {self.key.again}") from None
        return self._indexes[tar]

    def _descriptor(self, tar: int) -> int:
        if tar not in self._descriptors:
            self._descriptors[tar] = os.open(self.files[tar], os.O_RDONLY)
        return self._descriptors[tar]


def has_cache(shards: str | Path, key: Key) -> bool:
    """Whether a complete cache of this key lies beside the shards; what it holds is checked when it is opened."""
    return (key.folder(shards) / "manifest.json").is_file()


def _write_tar(file: Path, key: Key, samples: Iterable[tuple[int, Values]], num_samples: int) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    starts, counts, hashes, position = [], [], [], 0
    with temporary.open("wb") as stream:
        for hashed, values in samples:
            arrays = (
                [np.ascontiguousarray(values[name], dtype=dtype) for name, dtype, _ in key.fields] if values else []
            )
            for array, (name, _, width) in zip(arrays, key.fields):
                assert array.shape == (len(arrays[0]), width), (name, array.shape, width)
                stream.write(array.tobytes())
            starts.append(position)
            counts.append(len(arrays[0]) if arrays else 0)
            hashes.append(hashed)
            position = stream.tell()
    assert len(starts) == num_samples, (len(starts), num_samples)
    index = _index_of(file)
    index_temporary = index.with_name(f"{index.name}.{os.getpid()}.tmp")
    with index_temporary.open("wb") as stream:
        np.savez(
            stream,
            starts=np.array(starts, dtype=np.int64),
            counts=np.array(counts, dtype=np.int32),
            token_hashes=np.array(hashes, dtype=np.uint64),
        )
    os.replace(temporary, file)  # noqa: PTH105 - the atomic rename is the point
    os.replace(index_temporary, index)  # noqa: PTH105 - last: a file with an index is complete


def _index_of(file: Path) -> Path:
    return file.with_name(file.name + ".npz")


def _no_cache(shards: Path, key: Key) -> str:
    wanted, near = key.values, ""
    for manifest in sorted(shards.glob(f"{key.what}_*/manifest.json")):
        found = json.loads(manifest.read_text(encoding="utf-8")).get("key", {})
        if found.get("kind") == wanted.get("kind"):
            differing = [
                f"{name} {found.get(name)}, not {value}" for name, value in wanted.items() if found.get(name) != value
            ]
            near = f"; {manifest.parent} was written for another run: {', '.join(differing)}"
    return f"no {key.title} for this run in {shards}{near}; run {key.program} with the same settings"
