"""A run folder explains itself: composed config, environment, result; and it knows whether its run may go on.

``config.yaml`` is written once. The same command again finds it, compares it, and resumes; another config in the same
folder is refused with a diff, because a curve made of two configs explains nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_modules.checkpoint_files import list_checkpoints, newest_sound, tidy

WATCHING = ("logger", "run_dir", "callbacks.progress", "callbacks.checkpoint", "callbacks.throughput")
SPLITTING = ("trainer.devices", "trainer.num_nodes", "micro_batch_size", "data.micro_batch_size")
LOADING = ("data.num_workers", "data.pin_memory")
COMPUTING = (
    "model.moe.kernel",
    *(f"{model}.{key}" for model in ("model", "teacher") for key in ("attention", "compile", "gradient_checkpointing")),
    "stage.loss_kernel",
    "optimizer.fused",
)
NOT_COMPARED = (*WATCHING, *SPLITTING, *LOADING, *COMPUTING)
"""Keys that change how a run is watched, split, fed or computed: every step takes the same samples all the same."""

PACKAGES = ("torch", "lightning", "transformers", "timm", "hydra-core", "wandb", "fsspec", "numpy")


def write_json(path: Path, content: Any) -> None:
    """Write through a temporary file, so that a reader or a crash never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, or an empty dict when there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def open_run_folder(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Create or reopen a run folder; one whose run ended before its first validation has nothing to keep.

    Returns:
        What ``result.json`` says: ``{}`` for a new or an interrupted run; a run that is done has status ``finished``.

    Raises:
        ValueError: the folder belongs to a run with another config; the message holds the differing lines.
    """
    text = yaml.safe_dump(_compared(config), sort_keys=True)
    stored = folder / "config.yaml"
    if stored.exists():
        before = yaml.safe_dump(_compared(yaml.safe_load(stored.read_text())), sort_keys=True)
        if before != text and (folder / "before.json").exists():
            diff = difflib.unified_diff(
                before.splitlines(), text.splitlines(), "this folder", "this command", lineterm="", n=0
            )
            lines = [line for line in diff if not line.startswith(("---", "+++", "@@"))]
            raise ValueError(
                f"{folder} holds a run with another config; choose another run_name, or remove the folder to start "
                "over. What differs (- that run, + this command):\n" + "\n".join(lines)
            )
        if before == text:
            return read_json(folder / "result.json")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", environment())
    temporary = folder / ".config.yaml.tmp"
    temporary.write_text(yaml.safe_dump(dict(config), sort_keys=True))
    temporary.replace(stored)
    return {}


@contextlib.contextmanager
def sole_writer(folder: Path, *, wait_seconds: float = 60.0) -> Iterator[None]:
    """Hold the run folder: two processes that train into one folder would ruin each other's checkpoints.

    The lock goes with the process, however that ends; one that is just ending is waited for.

    Raises:
        ValueError: another process holds it still.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + wait_seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"another process trains in {folder}; stop it, or choose another run_name"
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Wait until no other process of this machine is between here and the end of the block; `file` holds the lock."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def prepare_resume(folder: Path) -> Path | None:
    """What a run goes on from; for the one process that may write to its folder.

    Leftovers of a killed process go, and broken checkpoints are set aside, after a comparison of every byte.
    """
    if not folder.is_dir():
        return None
    tidy(folder)
    newest = newest_sound(folder, deep=True)
    for path in list_checkpoints(folder):
        if path == newest:
            break
        path.replace(folder / f"broken_{path.name}")
    return newest


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files have their sizes, a folder; None when there is none."""
    return newest_sound(folder, deep=False) if folder.is_dir() else None


def environment() -> dict[str, Any]:
    """Commit, package versions, hardware and command line of this process."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": versions,
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
    }


def commit() -> str:
    """The git commit of the code, with ``+changes`` when the tree is not clean.

    Outside a checkout, a copy in a folder of another one included, it is what MOEVLM_COMMIT says (for code that travels
    without its history), or ``unknown``.
    """
    root = Path(__file__).resolve().parent.parent
    try:
        prefix, head, dirty = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--show-prefix"], ["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        prefix = "no checkout"
    if prefix:
        return os.environ.get("MOEVLM_COMMIT", "unknown")
    return head + ("+changes" if dirty else "")


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(json.dumps(config))
    for path in NOT_COMPARED:
        *parents, leaf = path.split(".")
        node: Any = kept
        for key in parents:
            node = node.get(key) or {}
        node.pop(leaf, None)
    return kept
