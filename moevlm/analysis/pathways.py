"""Token pathways: the experts that a token meets on its way through the MoE layers."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

Path = tuple[int, ...]


def count_pathways(top1_TL: np.ndarray) -> Counter[Path]:
    """How many tokens take each path.

    Args:
        top1_TL: int, expert of highest weight of each token in each MoE layer, layers in order.
    """
    if top1_TL.size == 0:
        return Counter()
    paths, counts = np.unique(top1_TL, axis=0, return_counts=True)
    return Counter({tuple(map(int, path)): int(count) for path, count in zip(paths, counts)})


def top_pathways(counts: Mapping[Path, int], num_paths: int) -> list[tuple[Path, int]]:
    """The most travelled paths and their tokens; ties by expert ids, so that no order of counting matters."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:num_paths]


def num_effective_paths(counts: Mapping[Path, int]) -> float:
    """``exp(entropy)`` of the tokens' distribution over paths: P when P paths are used evenly, 0 without tokens."""
    total = sum(counts.values())
    if total == 0:
        return 0.0
    shares = np.array([count for count in counts.values() if count], dtype=np.float64) / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def pca_curves(top1_TL: np.ndarray, num_experts: Sequence[int], num_curves: int) -> np.ndarray:
    """MoE-LLaVA's view of pathways: principal components of the expert ids over layers, quantised back to ids.

    MoE-LLaVA (arXiv:2401.15947), Fig. 5 and its script vis3: PCA of the matrix layers x tokens, so that each component
    is a curve over layers; min-max to [0, 1], clipped to [0.01, 0.99], ``floor(x * E)``. Expert ids are taken as
    ordinal numbers and no token need follow a curve: `count_pathways` is the honest count, this is for comparison
    with the paper. Deviations: SVD here (the sign of a component makes its largest entry positive), one E per layer.

    Args:
        top1_TL: as in `count_pathways`.
        num_experts: E of each layer.
        num_curves: components wanted; there are at most L - 1 of them, and at most T.

    Returns:
        [n, L] int64 ids, the strongest component first; n <= num_curves, components without variance left out.
    """
    num_tokens, num_layers = top1_TL.shape
    limit = min(num_curves, num_layers - 1, num_tokens)
    if limit < 1:
        return np.zeros((0, num_layers), dtype=np.int64)
    centred_LT = top1_TL.T.astype(np.float64)
    centred_LT -= centred_LT.mean(axis=0)
    # the left vectors of layers x tokens from the small layers x layers product: tokens may be hundreds of thousands
    variances_L, vectors_LL = np.linalg.eigh(centred_LT @ centred_LT.T)
    strongest = [i for i in np.argsort(-variances_L, kind="stable")[:limit] if variances_L[i] > 1e-9 * num_tokens]
    curves = []
    for component_L in vectors_LL[:, strongest].T:
        signed_L = component_L * np.sign(component_L[np.abs(component_L).argmax()])
        unit_L = (signed_L - signed_L.min()) / np.ptp(signed_L)
        curves.append(np.floor(unit_L.clip(0.01, 0.99) * np.asarray(num_experts)))
    return np.array(curves, dtype=np.int64).reshape(len(curves), num_layers)
