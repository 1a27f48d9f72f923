"""Tensors in one file or several with an index, as transformers lays them out; read lazily, written by shards."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LAYOUTS = (INDEX_FILE, WEIGHTS_FILE, "pytorch_model.bin.index.json", "pytorch_model.bin")
"""Where weights are looked for, the first found wins: safetensors before pickles."""

HUB_PREFIX = "hf-hub:"


def local_folder(source: str | Path, *, setting: str = "model.weights") -> Path:
    """The folder itself, or what ``hf-hub:owner/name`` downloads to.

    Raises:
        ValueError: no such folder, or the hub does not give it.
    """
    name = str(source)
    if not name.startswith(HUB_PREFIX):
        if not Path(name).is_dir():
            raise ValueError(f"no folder {name}; set {setting} to a folder, or to {HUB_PREFIX}owner/name")
        return Path(name)
    try:
        return Path(snapshot_download(name.removeprefix(HUB_PREFIX)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} cannot be had from the hub: {reason}; set {setting}") from error


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder by name, each read when it is asked for.

    Pickles are opened with ``weights_only``: they cannot run code.
    """

    def __init__(self, folder: str | Path) -> None:
        """Find the files and check that none is missing.

        Raises:
            ValueError: no weights here, a shard that the index lists is not there, or a file that cannot be read.
        """
        self.folder = Path(folder)
        layout = next((name for name in LAYOUTS if (self.folder / name).is_file()), None)
        if layout is None:
            raise ValueError(
                f"{folder} has no {WEIGHTS_FILE} and none of {', '.join(LAYOUTS[:1] + LAYOUTS[2:])}; the key that "
                "names it (model.weights, model.folder, model_folder, ...) is to name a complete one"
            )
        self._open: dict[str, Any] = {}
        if layout.endswith(".index.json"):
            self._files: dict[str, str] = self._read_index(layout)
        else:
            self._files = dict.fromkeys(self._opened(layout).keys(), layout)

    def __getitem__(self, name: str) -> Tensor:
        file = self._opened(self._files[name])
        try:
            tensor: Tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{self._files[name]} in {self.folder} lacks {name}, which its index lists") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        file = self._opened(self._files[name])
        return tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape())

    def _read_index(self, layout: str) -> dict[str, str]:
        files: dict[str, str] = json.loads((self.folder / layout).read_text())["weight_map"]
        shards = sorted(set(files.values()))
        missing = [shard for shard in shards if not (self.folder / shard).is_file()]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of the {len(shards)} files that {layout} lists: "
                f"{', '.join(missing[:3])}; copy or download the folder again"
            )
        return files

    def _opened(self, file_name: str) -> Any:
        if file_name not in self._open:
            path = self.folder / file_name
            try:
                if path.suffix == ".safetensors":
                    self._open[file_name] = safe_open(path, framework="pt")
                else:
                    self._open[file_name] = _load_pickle(path)
            except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"{path} cannot be read: {reason}; copy or download it again") from error
        return self._open[file_name]


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of torch < 1.6 cannot be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def plan_shards(sizes: Mapping[str, int], *, max_bytes: int) -> list[list[str]]:
    """Names cut into runs of at most `max_bytes` in all; a larger tensor stands alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_tensor_files(
    folder: str | Path, shards: list[list[str]], read_shard: Callable[[Iterable[str]], dict[str, Tensor] | None]
) -> None:
    """Write `WEIGHTS_FILE`, or several shards and `INDEX_FILE`; files of an earlier, larger or smaller save go.

    Args:
        shards: names per file, from `plan_shards`.
        read_shard: gives the tensors of these names, ready to be stored. It is called on every rank, since gathering
            sharded tensors takes all of them; a rank that is given None writes nothing.
    """
    folder = Path(folder)
    files = [WEIGHTS_FILE]
    if len(shards) > 1:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    total = 0
    is_writer = True
    for names, file in zip(shards, files):
        tensors = read_shard(names)
        is_writer = tensors is not None
        if tensors is not None:
            folder.mkdir(parents=True, exist_ok=True)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            save_file(tensors, folder / f"{file}.tmp", metadata={"format": "pt"})
    if not is_writer:
        return
    for file in files:
        (folder / f"{file}.tmp").replace(folder / file)
    if len(shards) > 1:
        weight_map = {name: file for names, file in zip(shards, files) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{INDEX_FILE}.tmp").write_text(json.dumps(index, indent=2) + "\n")
        (folder / f"{INDEX_FILE}.tmp").replace(folder / INDEX_FILE)
    else:
        (folder / INDEX_FILE).unlink(missing_ok=True)
    for stale in {*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS_FILE} - {folder / file for file in files}:
        stale.unlink(missing_ok=True)
