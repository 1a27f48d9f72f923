"""What the routers did, as numbers; pure functions without gradient.

Counts come first: over ranks and batches, add up counts and divide at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moevlm.batch import Segment


def choice_counts(expert_ids_TK: Tensor, *, num_experts: int) -> Tensor:
    """[E] float32: how often each expert was chosen; sums to T * K."""
    choices_M = expert_ids_TK.flatten()
    counts_E = torch.zeros(num_experts, device=choices_M.device)
    return counts_E.scatter_add_(0, choices_M, torch.ones_like(choices_M, dtype=counts_E.dtype))


def choice_counts_by_segment(expert_ids_TK: Tensor, segments_T: Tensor, *, num_experts: int) -> Tensor:
    """[len(Segment), E] float32: choices by the kind of token that made them.

    Raises:
        ValueError: the two inputs disagree on the number of tokens.
    """
    if expert_ids_TK.shape[0] != segments_T.shape[0]:
        raise ValueError(f"{segments_T.shape[0]} tokens in segments, {expert_ids_TK.shape[0]} in expert_ids")
    cells_TK = segments_T[:, None] * num_experts + expert_ids_TK
    return choice_counts(cells_TK, num_experts=len(Segment) * num_experts).view(len(Segment), num_experts)


def load(expert_ids_TK: Tensor, *, num_experts: int) -> Tensor:
    """[E]: share of all choices, which sums to 1; 1 / E each when even. Drops are not taken off."""
    return _shares(choice_counts(expert_ids_TK, num_experts=num_experts))


def load_by_segment(expert_ids_TK: Tensor, segments_T: Tensor, *, num_experts: int) -> Tensor:
    """[len(Segment), E]: the load among the tokens of each segment; a row sums to 1, or is 0 without such tokens."""
    return _shares(choice_counts_by_segment(expert_ids_TK, segments_T, num_experts=num_experts))


def importance(router_probs_TE: Tensor) -> Tensor:
    """[E]: mean router probability over tokens (arXiv:1701.06538, Eq. 6, as a mean); sums to 1."""
    return router_probs_TE.detach().float().mean(dim=0)


def entropy(router_probs_TE: Tensor) -> Tensor:
    """Scalar, nats: mean over tokens of ``-sum_e p_e log p_e``; 0 for a certain router, ``log(E)`` for an even one."""
    return torch.special.entr(router_probs_TE.detach().float()).sum(dim=-1).mean()


def dropped_fraction(dropped_TK: Tensor | None) -> Tensor:
    """Scalar in [0, 1]: choices lost to capacity, over all T * K choices; 0 for a dropless layer (None)."""
    return torch.zeros(()) if dropped_TK is None else dropped_TK.float().mean()


def expert_distance(weights: Sequence[Tensor]) -> Tensor:
    """How far the experts of a layer lie apart: mean over pairs of ``2 ||a - b|| / (||a|| + ||b||)`` (ours).

    Args:
        weights: the layer's stacked parameters, [E, ...] each; an expert is all its slices taken as one vector.

    Returns:
        Scalar: 0 for equal copies (just upcycled), about ``sqrt(2)`` for unrelated experts, at most 2.

    Raises:
        ValueError: fewer than two experts.
    """
    num_experts = weights[0].shape[0]
    if num_experts < 2:
        raise ValueError(f"a distance between experts needs at least 2 of them, got {num_experts}")
    # one stacked parameter after the other, without ever joining them: they may be large
    squared_EE = sum(_squared_distances(weight.detach().flatten(1)) for weight in weights)
    norms_E = sum(weight.detach().flatten(1).float().square().sum(dim=1) for weight in weights).sqrt()  # type: ignore[union-attr]
    first_P, second_P = torch.triu_indices(num_experts, num_experts, offset=1, device=norms_E.device)
    distances_P = torch.as_tensor(squared_EE)[first_P, second_P].sqrt()
    return (2 * distances_P / (norms_E[first_P] + norms_E[second_P])).mean()


def _squared_distances(vectors_ED: Tensor) -> Tensor:
    """[E, E]; by differences and not by products, which would lose small distances to rounding."""
    rows = [(vectors_ED - vector_D).float().square().sum(dim=1) for vector_D in vectors_ED]
    return torch.stack(rows)


def _shares(counts_E: Tensor) -> Tensor:
    return counts_E / counts_E.sum(dim=-1, keepdim=True).clamp_min(1)
