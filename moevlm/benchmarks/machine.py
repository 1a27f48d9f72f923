"""The machine that is measured: what it is, and the ceilings that nothing on it can beat."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU of today
_flush_buffers: dict[torch.device, Tensor] = {}


@dataclass(frozen=True)
class Ceilings:
    """Measured, not a data sheet's."""

    flop_per_second: float  # the best of a few square matrix products
    bytes_per_second: float  # a large tensor summed up: reading only


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def flush_cache(device: torch.device) -> None:
    """Overwrite the GPU's L2 cache, so that a step does not find its inputs there."""
    if device.type != "cuda":
        return
    if device not in _flush_buffers:
        _flush_buffers[device] = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    _flush_buffers[device].zero_()


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time matrix products and reading; a tenth of a second on a GPU, small sizes on a CPU."""
    on_gpu = device.type == "cuda"
    best = max(_products_per_second(side, device, dtype) for side in ((4096, 8192) if on_gpu else (256, 512)))
    numbers = torch.ones(2**29 if on_gpu else 2**22, device=device, dtype=torch.float32)
    return Ceilings(best, numbers.nbytes / _seconds(lambda: numbers.sum(), device))


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "device_type": device.type,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one.

    Raises:
        ValueError: a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} needs a GPU and there is none; set device=cpu")
    return torch.device(name)


def _products_per_second(side: int, device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / _seconds(lambda: torch.mm(left, right, out=out), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of batches of calls, so that starting them does not count."""
    calls, rounds = (10, 5) if device.type == "cuda" else (1, 5)
    for _ in range(3):
        work()
    seconds = []
    for _ in range(rounds):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronise(device)
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)
