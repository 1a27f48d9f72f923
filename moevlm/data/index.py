"""Byte-offset index beside a tar: where every member of every sample starts, so that any sample is one seek away."""

from __future__ import annotations

import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INDEX_SUFFIX = ".index.npz"
FIELDS = ("keys", "starts", "extensions", "offsets", "sizes", "tar_bytes")


@dataclass(frozen=True)
class ShardIndex:
    """n samples and their m members; sample i owns members ``starts[i]:starts[i + 1]``."""

    keys: np.ndarray  # [n] str
    starts: np.ndarray  # [n + 1] int64
    extensions: np.ndarray  # [m] str: everything after the first dot of the member's name, lower case
    offsets: np.ndarray  # [m] int64, of the member's bytes in the tar
    sizes: np.ndarray  # [m] int64, bytes
    tar_bytes: int  # size of the tar when it was indexed

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(extension, offset, size) of each member of a sample."""
        part = slice(int(self.starts[sample]), int(self.starts[sample + 1]))
        rows = zip(self.extensions[part].tolist(), self.offsets[part].tolist(), self.sizes[part].tolist())
        return [(extension, offset, size) for extension, offset, size in rows]


def index_path(tar: Path) -> Path:
    """The index file of a tar."""
    return tar.with_name(tar.name + INDEX_SUFFIX)


def scan_tar(tar: Path) -> tuple[ShardIndex, str]:
    """Read the headers of an uncompressed WebDataset tar.

    Returns:
        The index of what could be read, and what broke the reading off (empty when nothing did): the samples before
        the damage stay usable.
    """
    keys: list[str] = []
    starts: list[int] = []
    extensions: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    damage = ""
    tar_bytes = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isreg() or not dot or not stem:
                    continue
                if member.offset_data + member.size > tar_bytes:
                    damage = f"the file ends inside {member.name}"
                    break
                key = f"{folder}/{stem}" if folder else stem
                if not keys or keys[-1] != key:
                    keys.append(key)
                    starts.append(len(offsets))
                extensions.append(extension.lower())
                offsets.append(member.offset_data)
                sizes.append(member.size)
    except tarfile.TarError as error:
        damage = str(error)
    index = ShardIndex(
        keys=np.array(keys, dtype=np.str_),
        starts=np.array([*starts, len(offsets)], dtype=np.int64),
        extensions=np.array(extensions, dtype=np.str_),
        offsets=np.array(offsets, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
        tar_bytes=tar_bytes,
    )
    return index, damage


def write_index(tar: Path, index: ShardIndex) -> None:
    """Store an index beside its tar, published by rename."""
    path = index_path(tar)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several ranks may index the same tar
    with temporary.open("wb") as file:
        np.savez_compressed(file, **{name: getattr(index, name) for name in FIELDS})
    os.replace(temporary, path)  # noqa: PTH105 - the atomic rename is the point


def read_index(tar: Path) -> ShardIndex:
    """The stored index of a tar.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = index_path(tar)
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in FIELDS}
    except FileNotFoundError:
        raise ValueError(f"no index {path}; build the shards again or list the tars themselves") from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is broken ({error}); delete it and build the shards again") from None
    return ShardIndex(**{**arrays, "tar_bytes": int(arrays["tar_bytes"])})
