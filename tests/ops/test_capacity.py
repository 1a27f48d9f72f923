import pytest
import torch

from moevlm.ops.capacity import drop_over_capacity, expert_capacity, surviving_choices
from moevlm.ops.routing import top_k_routing
from tests.reference.moe import survivors


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "factor", "minimum", "expected"),
    [
        (8, 4, 1, 1.0, 0, 2),
        (9, 4, 1, 1.0, 0, 3),
        (8, 4, 2, 1.5, 0, 6),
        (8, 4, 1, 0.1, 0, 1),
        (8, 4, 1, 0.1, 4, 4),
        (8, 4, 2, 9.0, 0, 8),
        (4, 3, 1, 1.5, 0, 2),  # 4 / 3 * 1.5 is a little over 2 in floating point
    ],
)
def test_capacity_is_the_rounded_up_fair_share(num_tokens, num_experts, top_k, factor, minimum, expected):
    found = expert_capacity(
        num_tokens, num_experts=num_experts, top_k=top_k, capacity_factor=factor, min_capacity=minimum
    )
    assert found == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "capacity"), [(12, 4, 2, 3), (5, 2, 1, 2), (1, 3, 3, 1)]
)
def test_survivors_equal_the_plain_loop(num_tokens, num_experts, top_k, capacity, seed):
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    ids = top_k_routing(logits, top_k=top_k).expert_ids
    found = surviving_choices(ids, num_experts=num_experts, capacity=capacity)
    assert found.tolist() == survivors(ids.tolist(), num_experts, capacity)


def test_tokens_over_capacity_are_dropped_in_position_order():
    ids = torch.zeros(5, 1, dtype=torch.int64)
    kept = surviving_choices(ids, num_experts=2, capacity=3)
    assert kept.squeeze(1).tolist() == [True, True, True, False, False]


def test_every_first_choice_stands_before_any_second_choice():
    ids = torch.tensor([[0, 1], [1, 0], [1, 0]])
    kept = surviving_choices(ids, num_experts=2, capacity=2)
    assert kept.tolist() == [[True, False], [True, True], [True, False]]


def test_surviving_weights_sum_to_one_and_dropped_ones_are_zero():
    routing = drop_over_capacity(top_k_routing(torch.randn(40, 4), top_k=2), capacity=12)
    assert routing.dropped is not None
    assert routing.dropped.any()
    assert torch.equal(routing.expert_weights == 0, routing.dropped)
    has_survivor = ~routing.dropped.all(dim=1)
    torch.testing.assert_close(routing.expert_weights.sum(dim=1), has_survivor.float())


def test_a_token_that_lost_every_choice_gives_finite_gradients():
    logits = torch.zeros(6, 4, requires_grad=True)
    routing = drop_over_capacity(top_k_routing(logits, top_k=2), capacity=1)
    routing.expert_weights.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
