import json

import numpy as np
import pytest
import torch

from moevlm.analysis.statistics import RoutingStatistics
from moevlm.batch import Routing, Segment


def make_routing(num_tokens: int, num_experts: int, top_k: int, seed: int, drop: float = 0.0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    probs_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(top_k)
    dropped_TK = torch.rand(ids_TK.shape, generator=generator) < drop if drop else None
    return Routing(logits_TE, probs_TE, ids_TK, weights_TK, dropped_TK)


def make_segments(num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(4, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def test_counts_equal_a_plain_loop_over_batches() -> None:
    statistics = RoutingStatistics()
    expected = np.zeros((2, 4, 4), dtype=int)
    paths: dict[str, dict[tuple[int, int], int]] = {"image": {}, "text": {}}
    for batch in range(3):
        routings = {5: make_routing(40, 4, 2, batch), 1: make_routing(40, 4, 2, batch + 10)}
        segments = make_segments(40, batch)
        statistics.add(routings, segments)
        for token in range(40):
            segment = int(segments[token])
            for position, layer in enumerate((1, 5)):
                for expert in routings[layer].expert_ids[token].tolist():
                    expected[position, expert, segment] += 1
            path = tuple(int(routings[layer].router_probs[token].argmax()) for layer in (1, 5))
            counts = paths["image" if segment == Segment.IMAGE else "text"]
            counts[path] = counts.get(path, 0) + 1  # type: ignore[index, arg-type]
    assert list(statistics.layers) == [1, 5]
    np.testing.assert_array_equal([layer.choices for layer in statistics.layers.values()], expected)
    assert {name: dict(counts) for name, counts in statistics.pathways.items()} == paths
    assert statistics.num_tokens == 120


def test_shares_sum_to_one() -> None:
    statistics = RoutingStatistics()
    statistics.add({0: make_routing(100, 4, 2, 0)}, make_segments(100, 0))
    layer = statistics.layers[0]
    assert layer.load.sum() == pytest.approx(1)
    np.testing.assert_allclose(layer.load_by_segment.sum(axis=0), 1)
    np.testing.assert_allclose(layer.segments_of_expert.sum(axis=1), 1)
    assert layer.load_by_modality["text"].sum() == pytest.approx(1)


def test_a_segment_without_tokens_has_no_load_and_no_nan() -> None:
    statistics = RoutingStatistics()
    statistics.add({0: make_routing(10, 4, 1, 0)}, torch.full((10,), int(Segment.ANSWER)))
    assert statistics.layers[0].load_by_modality["image"].tolist() == [0] * 4
    assert statistics.top1("image").shape == (0, 1)


def test_the_summary_is_plain_json_with_entropy_and_dropped_fraction() -> None:
    statistics = RoutingStatistics()
    routing = make_routing(200, 4, 2, 0, drop=0.25)
    statistics.add({3: routing}, make_segments(200, 0))
    layer = json.loads(json.dumps(statistics.summary()))["layers"]["layer_03"]
    entropy = -(routing.router_probs * routing.router_probs.log()).sum(-1).mean()
    assert layer["entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert routing.dropped is not None
    assert layer["dropped_fraction"] == pytest.approx(float(routing.dropped.float().mean()))
    assert sum(layer["importance"]) == pytest.approx(1)


def test_tokens_kept_for_pca_are_bounded_and_counts_are_not() -> None:
    statistics = RoutingStatistics(max_pathway_tokens=25)
    for seed in range(3):
        statistics.add({0: make_routing(20, 4, 1, seed)}, torch.ones(20, dtype=torch.long))
    assert len(statistics.top1("text")) == 25
    assert statistics.pathways["text"].total() == 60


def test_what_does_not_fit_is_refused() -> None:
    statistics = RoutingStatistics()
    with pytest.raises(ValueError, match="no MoE layers"):
        statistics.add({}, make_segments(3, 0))
    with pytest.raises(ValueError, match="routed 4 tokens"):
        statistics.add({0: make_routing(4, 2, 1, 0)}, make_segments(3, 0))
    statistics.add({0: make_routing(3, 2, 1, 0)}, make_segments(3, 0))
    with pytest.raises(ValueError, match="counted before"):
        statistics.add({1: make_routing(3, 2, 1, 0)}, make_segments(3, 0))
