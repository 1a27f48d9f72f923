"""Peers measured side by side: checked against a reference first, then timed, medians over a floor.

A suite is a generator of `Case`s. A case is one problem (sizes, data) and the `Contender`s that solve it, one after
another in one process. One that cannot be imported or run is reported with the reason, one whose results differ from
the reference is reported as wrong; neither is timed.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from moevlm.benchmarks.machine import Ceilings, flush_cache, synchronise

Outputs = Mapping[str, Tensor]


@dataclass
class Work:
    """What a contender does, built and ready; everything that `build` allocated is not part of its peak memory."""

    step: Callable[[], object]  # what is timed
    outputs: Callable[[], Outputs] | None = None  # compared with the reference's, by name; None: nothing to compare
    units: Mapping[str, float] = field(default_factory=dict)  # of one step: "flop", "byte", "token" ...; shown as rates


@dataclass
class Contender:
    """One way to solve a case."""

    name: str
    build: Callable[[], Work]  # imports what it needs: whatever this raises is the reason why it is not run


@dataclass
class Case:
    """One problem and who solves it.

    The floor is what ratios are taken over: the name of a contender, listed first, or seconds from the ceilings.
    """

    name: str
    contenders: list[Contender]
    floor: str | Callable[[Ceilings], float]
    reference: Callable[[], Outputs] | None = None
    tolerance: float = 2e-2  # of ||found - expected|| / ||expected||, each output by itself
    facts: Mapping[str, float | str] = field(default_factory=dict)  # sizes and whatever else explains the row


@dataclass
class Result:
    """One row: a contender in a case."""

    case: str
    contender: str
    status: str = "ok"  # ok, wrong, not run
    why: str = ""
    seconds: float | None = None  # median
    slowest_seconds: float | None = None
    repeats: int = 0
    ratio: float | None = None  # seconds over the floor's
    peak_gib: float | None = None  # beyond what was allocated before the step; None on a CPU
    held_gib: float | None = None  # that: inputs, parameters, what an optimizer keeps
    errors: dict[str, float] = field(default_factory=dict)  # relative, by output
    rates: dict[str, float] = field(default_factory=dict)  # units a second
    facts: dict[str, float | str] = field(default_factory=dict)


def run_cases(
    cases: Iterable[Case],
    *,
    device: torch.device,
    ceilings: Ceilings,
    warmup: int = 5,
    repeats: int = 20,
    most_seconds: float = 5.0,
    only: str | None = None,
    skip: str | None = None,
) -> Iterator[Result]:
    """Measure every contender of every case, in order.

    Args:
        repeats: at most; fewer (at least 3) where they would take longer than `most_seconds`.
        only: measure contenders whose "case/contender" contains this (or one of several, between "|"), and the
            floors of their cases.
        skip: and of these none that contains this (or one of several).

    Raises:
        ValueError: `repeats` or `warmup` that measure nothing.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(
            f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}; set these keys"
        )
    for case in cases:
        named = [one for one in case.contenders if _is_named(f"{case.name}/{one.name}", only, skip)]
        wanted = [one for one in case.contenders if one in named or (named and one.name == case.floor)]
        yield from _run_case(case, wanted, device, ceilings, Timing(warmup, repeats, most_seconds))
        release(device)


class Timing(NamedTuple):
    """How often a step is called."""

    warmup: int
    repeats: int
    most_seconds: float


def _run_case(
    case: Case, contenders: Iterable[Contender], device: torch.device, ceilings: Ceilings, timing: Timing
) -> Iterator[Result]:
    floor_seconds = None if isinstance(case.floor, str) else case.floor(ceilings)
    expected: Outputs | None = None
    for contender in contenders:
        is_floor = contender.name == case.floor
        if expected is None and case.reference is not None and not is_floor:
            expected = {name: tensor.detach() for name, tensor in case.reference().items()}
        result = Result(case.name, contender.name, facts=dict(case.facts))
        try:
            _measure(result, contender.build(), expected, case.tolerance, device, timing)
        except Exception as error:  # a peer may fail in any way, and the others are still to be measured
            first_line = (str(error).strip().splitlines() or [""])[0]
            result.status, result.why = "not run", f"{type(error).__name__}: {first_line}"[:300]
        release(device)
        if is_floor:
            floor_seconds = result.seconds
        if result.seconds is not None and floor_seconds:
            result.ratio = result.seconds / floor_seconds
        yield result


def _is_named(name: str, only: str | None, skip: str | None) -> bool:
    return (only is None or _has_any(name, only)) and (skip is None or not _has_any(name, skip))


def _has_any(name: str, parts: str) -> bool:
    return any(part in name for part in parts.split("|"))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``||found - expected|| / ||expected||`` in float64 on large tensors' own device; inf for another shape or NaN."""
    if found.shape != expected.shape:
        return math.inf
    difference = (found.detach().float() - expected.float()).norm(dtype=torch.float32)
    error = (difference / expected.float().norm(dtype=torch.float32).clamp_min(1e-30)).item()
    return math.inf if math.isnan(error) else error


def median_seconds(
    step: Callable[[], object], *, device: torch.device, warmup: int, repeats: int, most_seconds: float
) -> tuple[float, float, int]:
    """Median, slowest and number of timed calls.

    On a GPU CUDA events around each call, with the L2 cache overwritten before; the host is not made to wait between
    calls, so that it runs ahead as in training, and a step that waits for the GPU itself pays for that.
    """
    for _ in range(warmup):
        step()
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    once = time.perf_counter() - start
    repeats = max(min(repeats, int(most_seconds / max(once, 1e-9))), min(3, repeats))
    if device.type == "cuda":
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for before, after in events:
            flush_cache(device)
            before.record()
            step()
            after.record()
        synchronise(device)
        seconds = [before.elapsed_time(after) / 1e3 for before, after in events]
    else:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            synchronise(device)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), max(seconds), repeats


def peak_gib(step: Callable[[], object], device: torch.device) -> float | None:
    """Peak of the allocator during one call, beyond what was allocated before it; None where nothing counts that."""
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    synchronise(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def release(device: torch.device) -> None:
    """Free what the last contender left on a GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _measure(
    result: Result,
    work: Work,
    expected: Outputs | None,
    tolerance: float,
    device: torch.device,
    timing: Timing,
) -> None:
    if expected is not None and work.outputs is not None:
        found = work.outputs()
        result.errors = {name: relative_error(found[name], expected[name]) for name in expected if name in found}
        del found
        wrong = [f"{name} {error:.2g}" for name, error in result.errors.items() if not error <= tolerance]
        if wrong or not result.errors:
            result.status = "wrong"
            result.why = f"relative error {', '.join(wrong) or 'unknown: no output to compare'}, allowed {tolerance:g}"
            return
    work.step()  # the first call compiles, tunes and caches
    release(device)
    result.held_gib = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else None
    result.peak_gib = peak_gib(work.step, device)
    timed = median_seconds(work.step, device=device, **timing._asdict())
    result.seconds, result.slowest_seconds, result.repeats = timed
    result.rates = {unit: amount / result.seconds for unit, amount in work.units.items()}
