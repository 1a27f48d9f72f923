"""Triton: a stable counting sort of choices by expert, in one pass over the choices for counting and one for placing.

Choices are cut into blocks. Each block counts its experts; one program turns the counts into the first row of every
(expert, block); each block then places its choices, in order, from there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ONE_HOT = 8192  # numbers in a block's one-hot matrix
SCAN_NUMBERS = 4096  # the same for a tile of the scan


@triton.jit
def _one_hot(ids_ptr, dropped_ptr, first, num_choices, HAS_DROPPED: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr):
    choices = first + tl.arange(0, BLOCK)
    inside = choices < num_choices
    ids = tl.load(ids_ptr + choices, mask=inside, other=E).to(tl.int32)
    if HAS_DROPPED:
        dropped = tl.load(dropped_ptr + choices, mask=inside, other=1)
        ids = tl.where(dropped != 0, E, ids)  # no expert's number
    return choices, inside, (ids[:, None] == tl.arange(0, E)[None, :]).to(tl.int32)


@triton.jit
def _count(
    ids_ptr, dropped_ptr, blocks_ptr, num_choices, HAS_DROPPED: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr
):
    block = tl.program_id(0)
    _, _, hot = _one_hot(ids_ptr, dropped_ptr, block * BLOCK, num_choices, HAS_DROPPED, BLOCK, E)
    tl.store(blocks_ptr + block * E + tl.arange(0, E), tl.sum(hot, axis=0))


@triton.jit
def _scan(blocks_ptr, counts_ptr, num_blocks, num_experts, TILE: tl.constexpr, E: tl.constexpr):
    """Counts of (block, expert) become first rows of (block, expert), in place; one program."""
    experts = tl.arange(0, E)
    rows = tl.arange(0, TILE)
    totals = tl.zeros((E,), dtype=tl.int32)
    for first in range(0, num_blocks, TILE):
        places = (first + rows)[:, None] * E + experts[None, :]
        totals += tl.sum(tl.load(blocks_ptr + places, mask=(first + rows)[:, None] < num_blocks, other=0), axis=0)
    tl.store(counts_ptr + experts, totals, mask=experts < num_experts)
    running = tl.cumsum(totals, axis=0) - totals
    for first in range(0, num_blocks, TILE):
        places = (first + rows)[:, None] * E + experts[None, :]
        inside = (first + rows)[:, None] < num_blocks
        counts = tl.load(blocks_ptr + places, mask=inside, other=0)
        tl.store(blocks_ptr + places, running[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        running += tl.sum(counts, axis=0)


@triton.jit
def _place(
    ids_ptr, dropped_ptr, blocks_ptr, counts_ptr, row_of_choice_ptr, choice_of_row_ptr, num_choices, num_experts,
    HAS_DROPPED: tl.constexpr, ALONE: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    choices, inside, hot = _one_hot(ids_ptr, dropped_ptr, block * BLOCK, num_choices, HAS_DROPPED, BLOCK, E)
    experts = tl.arange(0, E)
    if ALONE:  # the only block needs no other kernel
        totals = tl.sum(hot, axis=0)
        tl.store(counts_ptr + experts, totals, mask=experts < num_experts)
        starts = tl.cumsum(totals, axis=0) - totals
    else:
        starts = tl.load(blocks_ptr + block * E + experts)
    rows = tl.sum(hot * (starts[None, :] + tl.cumsum(hot, axis=0) - 1), axis=1)
    kept = tl.sum(hot, axis=1) > 0
    tl.store(row_of_choice_ptr + choices, tl.where(kept, rows, -1), mask=inside)
    tl.store(choice_of_row_ptr + rows, choices, mask=kept)


def sort_choices(
    expert_ids_TK: Tensor, dropped_TK: Tensor | None, *, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moevlm.ops.expert_order.sort_choices`."""
    ids_TK = expert_ids_TK.contiguous()
    dropped_TK = ids_TK if dropped_TK is None else dropped_TK.contiguous()
    flags = {"HAS_DROPPED": dropped_TK is not ids_TK, "E": max(2, triton.next_power_of_2(num_experts))}
    flags["BLOCK"] = max(16, min(1024, MOST_ONE_HOT // flags["E"], triton.next_power_of_2(ids_TK.numel())))
    row_of_choice_TK = torch.empty_like(ids_TK, dtype=torch.int32)
    # rows that dropped choices leave over are copied like the others before the host knows how many there are
    new = torch.zeros if flags["HAS_DROPPED"] else torch.empty
    choice_of_row_M = new(ids_TK.numel(), dtype=torch.int32, device=ids_TK.device)
    counts_E = torch.empty(num_experts, dtype=torch.int32, device=ids_TK.device)
    num_blocks = triton.cdiv(ids_TK.numel(), flags["BLOCK"])
    blocks_BE = torch.empty(num_blocks, flags["E"], dtype=torch.int32, device=ids_TK.device)
    if num_blocks > 1:
        _count[(num_blocks,)](ids_TK, dropped_TK, blocks_BE, ids_TK.numel(), **flags)
        tile = min(triton.next_power_of_2(num_blocks), max(1, SCAN_NUMBERS // flags["E"]))
        _scan[(1,)](blocks_BE, counts_E, num_blocks, num_experts, TILE=tile, E=flags["E"])
    _place[(max(num_blocks, 1),)](
        ids_TK, dropped_TK, blocks_BE, counts_E, row_of_choice_TK, choice_of_row_M, ids_TK.numel(), num_experts,
        ALONE=num_blocks <= 1, **flags,
    )  # fmt: skip
    return row_of_choice_TK, choice_of_row_M, counts_E
