import math

import pytest
import torch

from moevlm.losses.moe import load_balancing_loss, router_z_loss
from moevlm.ops.routing import top_k_routing
from tests.reference.moe import load_balancing, router_z


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 4, 1), (20, 4, 2), (9, 3, 3)])
def test_load_balancing_equals_the_plain_loop(num_tokens, num_experts, top_k, seed):
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    routing = top_k_routing(logits, top_k=top_k)
    found = load_balancing_loss(routing.router_probs, routing.expert_ids)
    torch.testing.assert_close(
        float(found), load_balancing(routing.router_probs, routing.expert_ids), rtol=1e-5, atol=0
    )


def test_an_even_load_costs_one():
    ids = torch.arange(8).view(4, 2) % 4
    torch.testing.assert_close(load_balancing_loss(torch.full((4, 4), 0.25), ids), torch.tensor(1.0))


def test_all_tokens_to_the_same_k_experts_cost_num_experts_over_k():
    probs = torch.tensor([[0.7, 0.3, 0.0, 0.0, 0.0, 0.0]]).expand(9, 6)
    ids = torch.tensor([[0, 1]]).expand(9, 2)
    torch.testing.assert_close(load_balancing_loss(probs, ids), torch.tensor(3.0))


def test_permuting_tokens_changes_no_loss():
    logits, order = torch.randn(30, 4), torch.randperm(30)
    first, second = top_k_routing(logits, top_k=2), top_k_routing(logits[order], top_k=2)
    torch.testing.assert_close(
        load_balancing_loss(first.router_probs, first.expert_ids),
        load_balancing_loss(second.router_probs, second.expert_ids),
    )
    torch.testing.assert_close(router_z_loss(logits), router_z_loss(logits[order]))


def test_its_gradient_lowers_the_probability_of_the_overloaded_expert():
    logits = torch.tensor([[1.0, 0.0, 0.0]]).repeat(5, 1).requires_grad_()
    routing = top_k_routing(logits, top_k=1)
    load_balancing_loss(routing.router_probs, routing.expert_ids).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_disagreeing_token_counts_are_refused():
    with pytest.raises(ValueError, match="3 tokens in router_probs, 2 in expert_ids"):
        load_balancing_loss(torch.zeros(3, 4), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("seed", range(3))
def test_z_loss_equals_the_plain_loop(seed):
    logits = torch.randn(11, 5, generator=torch.Generator().manual_seed(seed)) * 3
    torch.testing.assert_close(float(router_z_loss(logits)), router_z(logits), rtol=1e-5, atol=0)


def test_z_loss_of_zero_logits_is_the_squared_log_of_the_number_of_experts():
    torch.testing.assert_close(float(router_z_loss(torch.zeros(3, 8))), math.log(8) ** 2, rtol=1e-6, atol=0)
