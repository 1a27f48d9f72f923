import pytest
import torch

from moevlm.ops.dispatch import combine, dispatch_by_expert, permute


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 3, 1), (9, 4, 2), (5, 2, 2)])
def test_identity_experts_give_the_tokens_back(num_tokens, num_experts, top_k):
    hidden = torch.randn(num_tokens, 6)
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])
    dispatch = dispatch_by_expert(ids, num_experts=num_experts)
    weights = torch.full((num_tokens, top_k), 1 / top_k)
    torch.testing.assert_close(combine(permute(hidden, dispatch, top_k=top_k), dispatch, weights), hidden)


def test_each_expert_gets_its_tokens_in_order():
    ids = torch.tensor([[1, 0], [0, 2], [1, 2]])
    dispatch = dispatch_by_expert(ids, num_experts=4)
    assert dispatch.counts == (2, 2, 2, 0)
    rows = permute(torch.arange(3.0)[:, None], dispatch, top_k=2)
    assert rows.squeeze(1).tolist() == [0, 1, 0, 2, 1, 2]


def test_dropped_choices_are_not_computed_and_add_nothing():
    ids = torch.tensor([[0], [0], [1]])
    dropped = torch.tensor([[False], [True], [False]])
    dispatch = dispatch_by_expert(ids, num_experts=2, dropped_TK=dropped)
    assert dispatch.counts == (1, 1)
    output = combine(permute(torch.ones(3, 4), dispatch, top_k=1), dispatch, torch.ones(3, 1))
    assert output.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4]


def test_all_choices_dropped_gives_zero():
    dispatch = dispatch_by_expert(
        torch.zeros(2, 1, dtype=torch.int64), num_experts=2, dropped_TK=torch.ones(2, 1).bool()
    )
    rows = permute(torch.ones(2, 4), dispatch, top_k=1)
    assert torch.equal(combine(rows, dispatch, torch.zeros(2, 1)), torch.zeros(2, 4))
