"""Independent pieces of GPU work side by side: the last wave of one product leaves room that the next one fills."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_side_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


class Lanes:
    """Streams that work alternates over; the current stream is the first. On other devices there is one lane."""

    def __init__(self, device: torch.device, streams: Sequence[torch.cuda.Stream]) -> None:
        self.device, self.streams = device, streams

    def __len__(self) -> int:
        return 1 + len(self.streams)

    def on(self, lane: int) -> AbstractContextManager[object]:
        """Work started inside goes to this lane."""
        return nullcontext() if lane == 0 else torch.cuda.stream(self.streams[lane - 1])


@contextmanager
def open_lanes(device: torch.device, *, num_lanes: int) -> Iterator[Lanes]:
    """Lanes that start after all earlier work of the current stream, and which all later work of it waits for.

    Memory that the lanes use must have been allocated outside: then it is free to reuse once the block has ended.
    """
    if device.type != "cuda" or num_lanes <= 1:
        yield Lanes(device, [])
        return
    known = _side_streams.setdefault(device, [])
    while len(known) < num_lanes - 1:
        known.append(torch.cuda.Stream(device))
    current, side = torch.cuda.current_stream(device), known[: num_lanes - 1]
    for stream in side:
        stream.wait_stream(current)
    try:
        yield Lanes(device, side)
    finally:
        for stream in side:
            current.wait_stream(stream)


def assign(sizes: Sequence[int], *, num_lanes: int) -> list[list[int]]:
    """Which pieces each lane takes, in order: the largest first, each to the lane that has least to do."""
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    loads = [0] * num_lanes
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        if sizes[piece]:
            lane = loads.index(min(loads))
            lanes[lane].append(piece)
            loads[lane] += sizes[piece]
    return lanes
