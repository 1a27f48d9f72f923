import math

import pytest
import torch

from moevlm.batch import Segment
from moevlm.metrics.routing import (
    choice_counts,
    dropped_fraction,
    entropy,
    expert_distance,
    importance,
    load,
    load_by_segment,
)

IDS = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0]])


def test_counts_and_load_name_every_expert_even_the_empty_one():
    assert choice_counts(IDS, num_experts=5).tolist() == [4, 2, 1, 1, 0]
    torch.testing.assert_close(load(IDS, num_experts=5), torch.tensor([4, 2, 1, 1, 0]) / 8)


def test_load_by_segment_is_normalised_within_each_segment_that_has_tokens():
    segments = torch.tensor([Segment.IMAGE, Segment.IMAGE, Segment.ANSWER, Segment.ANSWER])
    found = load_by_segment(IDS, segments, num_experts=4)
    assert found[Segment.IMAGE].tolist() == [0.5, 0.25, 0.25, 0.0]
    assert found[Segment.ANSWER].tolist() == [0.5, 0.25, 0.0, 0.25]
    assert found[Segment.QUESTION].tolist() == [0.0] * 4


def test_load_by_segment_refuses_another_number_of_tokens():
    with pytest.raises(ValueError, match="3 tokens in segments, 4 in expert_ids"):
        load_by_segment(IDS, torch.zeros(3, dtype=torch.int64), num_experts=4)


def test_importance_is_the_mean_probability():
    torch.testing.assert_close(importance(torch.tensor([[1.0, 0.0], [0.5, 0.5]])), torch.tensor([0.75, 0.25]))


def test_entropy_is_zero_for_certainty_and_log_of_experts_for_none():
    assert float(entropy(torch.eye(4))) == 0.0
    torch.testing.assert_close(float(entropy(torch.full((3, 4), 0.25))), math.log(4), rtol=1e-6, atol=0)


def test_a_dropless_layer_drops_nothing():
    assert float(dropped_fraction(None)) == 0.0
    assert float(dropped_fraction(torch.tensor([[True, False], [False, False]]))) == 0.25


def test_equal_copies_have_no_distance():
    weight = torch.randn(5, 3).expand(4, 5, 3)
    assert float(expert_distance([weight, weight])) == 0.0


def test_distance_over_several_parameters_equals_that_of_the_joined_vectors():
    first, second = torch.randn(3, 4, 5), torch.randn(3, 6)
    joined = torch.cat([first.flatten(1), second], dim=1)
    expected = [
        2 * (joined[a] - joined[b]).norm() / (joined[a].norm() + joined[b].norm()) for a, b in [(0, 1), (0, 2), (1, 2)]
    ]
    torch.testing.assert_close(expert_distance([first, second]), torch.stack(expected).mean())


def test_opposite_experts_have_distance_two():
    weight = torch.randn(7)
    torch.testing.assert_close(expert_distance([torch.stack([weight, -weight])]), torch.tensor(2.0))


def test_one_expert_has_no_distance():
    with pytest.raises(ValueError, match="at least 2"):
        expert_distance([torch.randn(1, 3)])
