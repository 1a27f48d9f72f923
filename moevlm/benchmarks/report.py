"""What a benchmark leaves: JSON lines while it runs, a table when it is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moevlm.benchmarks.harness import Result

RATES = {"flop": (1e12, "TFLOP/s"), "byte": (1e9, "GB/s"), "token": (1.0, "tokens/s")}


def write_results(path: Path, about: Mapping[str, Any], results: Iterable[Result]) -> list[Result]:
    """Write one JSON line about the run, then one for each result as it comes; an earlier file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    collected = []
    with path.open("w") as file:
        file.write(json.dumps({"kind": "run", **about}) + "\n")
        for result in results:
            file.write(json.dumps({"kind": "result", **dataclasses.asdict(result)}) + "\n")
            file.flush()
            collected.append(result)
            print(f"{result.case}/{result.contender}: {summary(result)}", flush=True)
    return collected


def summary(result: Result) -> str:
    """One line: time and ratio, or why there is none."""
    if result.seconds is None:
        return f"{result.status}: {result.why}"
    ratio = "" if result.ratio is None else f", {result.ratio:.2f} times the floor"
    memory = "" if result.peak_gib is None else f", peak {result.peak_gib:.2f} GiB"
    return f"{1e3 * result.seconds:.3f} ms{ratio}{memory}"


def show_table(suite: str, about: Mapping[str, Any], results: Iterable[Result], console: Console | None = None) -> None:
    """Print the results as a table, a section for each case."""
    ceiling = f"ceilings: {about['ceilings']['flop_per_second'] / 1e12:.1f} TFLOP/s"
    ceiling += f", {about['ceilings']['bytes_per_second'] / 1e9:.0f} GB/s"
    title = f"{suite} on {about['device']}, torch {about['torch']}, commit {about['commit'][:9]}; {ceiling}"
    table = Table(title=title)
    table.add_column("case")
    table.add_column("contender")
    for name in ("ms", "x floor", "peak GiB", "rates", "largest error"):
        table.add_column(name, justify="right")
    last = None
    for result in results:
        if result.case != last:
            table.add_section()
        table.add_row(result.case if result.case != last else "", result.contender, *_cells(result))
        last = result.case
    (console or Console(width=160)).print(table)


def _cells(result: Result) -> list[str]:
    if result.seconds is None:
        return [result.status, "", "", result.why[:60], ""]
    rates = []
    for unit, rate in result.rates.items():
        scale, name = RATES.get(unit, (1.0, f"{unit}/s"))
        rates.append(f"{rate / scale:,.1f} {name}")
    error = max(result.errors.values(), default=None)
    return [
        f"{1e3 * result.seconds:.3f}",
        "" if result.ratio is None else f"{result.ratio:.2f}",
        "" if result.peak_gib is None else f"{result.peak_gib:.2f}",
        "  ".join(rates),
        "" if error is None else f"{error:.1e}",
    ]
