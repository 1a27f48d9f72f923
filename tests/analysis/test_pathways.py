from collections import Counter

import numpy as np
import pytest

from moevlm.analysis.pathways import count_pathways, num_effective_paths, pca_curves, top_pathways


@pytest.mark.parametrize(("num_tokens", "num_layers", "num_experts"), [(1, 1, 1), (50, 3, 4), (200, 6, 2), (0, 3, 4)])
def test_counting_equals_a_plain_loop(num_tokens: int, num_layers: int, num_experts: int) -> None:
    top1_TL = np.random.default_rng(0).integers(num_experts, size=(num_tokens, num_layers))
    expected: Counter[tuple[int, ...]] = Counter()
    for token in range(num_tokens):
        expected[tuple(int(top1_TL[token, layer]) for layer in range(num_layers))] += 1
    assert count_pathways(top1_TL) == expected


def test_top_paths_do_not_depend_on_the_order_of_counting() -> None:
    counts = Counter({(1, 2): 3, (0, 0): 5, (0, 1): 3})
    assert top_pathways(counts, 2) == [((0, 0), 5), ((0, 1), 3)]
    assert top_pathways(Counter(dict(reversed(counts.items()))), 2) == top_pathways(counts, 2)


def test_effective_paths_of_even_and_single_use() -> None:
    assert num_effective_paths(Counter({(0,): 4, (1,): 4, (2,): 4})) == pytest.approx(3)
    assert num_effective_paths(Counter({(0,): 12})) == pytest.approx(1)
    assert num_effective_paths(Counter()) == 0


def test_pca_curves_lie_on_expert_ids_of_their_layer() -> None:
    top1_TL = np.random.default_rng(0).integers([4, 8, 2, 4], size=(300, 4))
    curves = pca_curves(top1_TL, [4, 8, 2, 4], 10)
    assert curves.shape == (3, 4)  # one fewer than layers
    assert (curves >= 0).all()
    assert (curves < np.array([4, 8, 2, 4])).all()


def test_pca_needs_something_that_varies_over_layers() -> None:
    assert len(pca_curves(np.full((20, 4), 2), [4] * 4, 10)) == 0
    assert len(pca_curves(np.zeros((20, 1), dtype=int), [4], 10)) == 0
    assert len(pca_curves(np.zeros((0, 4), dtype=int), [4] * 4, 10)) == 0


def test_the_first_curve_follows_tokens_that_all_do_the_same() -> None:
    assert pca_curves(np.tile([0, 3, 3, 0], (50, 1)), [4] * 4, 10).tolist() in ([[0, 3, 3, 0]], [[3, 0, 0, 3]])
