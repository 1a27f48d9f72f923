"""The suites by name, and how one is run."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moevlm.benchmarks.harness import Case, Result, run_cases
from moevlm.benchmarks.machine import choose_device, describe, measure_ceilings
from moevlm.benchmarks.report import show_table, write_results

SUITES = ("moe_layer", "losses", "train_step", "generation", "loader")
"""Each a module of this folder with ``cases(size=, device=)``, which yields the cases of that size."""

SIZES = ("full", "tiny")
"""What is reported, and what a CPU does in seconds (for tests)."""


def find_cases(suite: str) -> Callable[..., Iterator[Case]]:
    """The suite's `cases`.

    Raises:
        ValueError: an unknown suite.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}; set suite")
    return importlib.import_module(f"moevlm.benchmarks.{suite}").cases  # type: ignore[no-any-return]


def run_suite(
    suite: str,
    *,
    size: str = "full",
    device: str = "auto",
    output: str | Path = "outputs/benchmarks",
    commit: str = "unknown",
    only: str | None = None,
    skip: str | None = None,
    warmup: int = 5,
    repeats: int = 20,
    most_seconds: float = 5.0,
) -> list[Result]:
    """Run one suite: ``<output>/<suite>.jsonl`` and a table. For the other arguments see `run_cases`.

    Raises:
        ValueError: an unknown suite or size, or a device that is not there.
    """
    cases = find_cases(suite)
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(SIZES)}; set size")
    place = choose_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    ceilings = measure_ceilings(place, dtype)
    about: dict[str, Any] = {"suite": suite, "size": size, "commit": commit, "ceilings_dtype": str(dtype)}
    about |= {"ceilings": dataclasses.asdict(ceilings), **describe(place)}
    measured = run_cases(
        cases(size=size, device=place),
        device=place,
        ceilings=ceilings,
        warmup=warmup,
        repeats=repeats,
        most_seconds=most_seconds,
        only=only,
        skip=skip,
    )
    results = write_results(Path(output) / f"{suite}.jsonl", about, measured)
    show_table(suite, about, results)
    return results
