"""Tokens to experts and back, the plain way: sort choices by expert, run each expert on its rows, add up.

Exactly the chosen rows are computed and nothing of size T x E x C exists. The numbers of rows per expert go to the
host once per layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """The order in which choices are computed; M = choices that were not dropped."""

    choices: Tensor  # [M] int64, indices into the flattened [T * K] choices, ordered by expert, then by token
    counts: tuple[int, ...]  # [E] rows of each expert; sums to M


def dispatch_by_expert(expert_ids_TK: Tensor, *, num_experts: int, dropped_TK: Tensor | None = None) -> Dispatch:
    """Order the choices by expert; dropped ones are left out."""
    ids_M = expert_ids_TK.flatten()
    if dropped_TK is not None:
        ids_M = torch.where(dropped_TK.flatten(), num_experts, ids_M)  # behind every real expert
    choices_M = torch.argsort(ids_M, stable=True)
    counts = torch.bincount(ids_M, minlength=num_experts)[:num_experts].tolist()
    return Dispatch(choices_M[: sum(counts)], tuple(counts))


def permute(hidden_TD: Tensor, dispatch: Dispatch, *, top_k: int) -> Tensor:
    """[M, D]: the token of each choice, in the order of `dispatch`."""
    return hidden_TD.index_select(0, torch.div(dispatch.choices, top_k, rounding_mode="floor"))


def combine(rows_MD: Tensor, dispatch: Dispatch, expert_weights_TK: Tensor) -> Tensor:
    """Weighted sum over each token's experts, ``y_t = sum_k weight_tk * expert_k(x_t)``; a dropped choice adds 0.

    Added in float32 and in the order of the choices, so the result does not depend on the order of the rows.

    Returns:
        [T, D] in the dtype of `rows_MD`.
    """
    num_tokens, top_k = expert_weights_TK.shape
    rows_CD = rows_MD.new_zeros(num_tokens * top_k, rows_MD.shape[-1]).index_copy(0, dispatch.choices, rows_MD)
    weighted_TKD = rows_CD.view(num_tokens, top_k, rows_MD.shape[-1]).float() * expert_weights_TK.float().unsqueeze(-1)
    return weighted_TKD.sum(dim=1).to(rows_MD.dtype)
