import pytest
import torch
from torch import nn

from moevlm.models.moe.experts import StackedExperts
from moevlm.models.moe.moe_layer import SparseMoE
from moevlm.models.moe.recorder import RoutingRecorder
from moevlm.models.moe.router import Router, random_routing
from moevlm.models.moe.settings import MoESettings
from tests.models.ffns import FFNS, WIDTH, PlainFFN, different_experts
from tests.reference.moe import moe_forward


def make_layer(experts, *, top_k=2, seed=0, **options):
    jitter = options.get("jitter", 0.0)
    router = Router(WIDTH, experts.num_experts, init_std=1.0, seed=seed, jitter=jitter)
    settings = MoESettings(num_experts=experts.num_experts, top_k=top_k, **options)
    return SparseMoE(router, experts, settings=settings, layer_index=3, recorder=RoutingRecorder())


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 4, 2), (17, 4, 1), (17, 3, 2), (6, 2, 2)])
def test_layer_equals_the_plain_loop(ffn, num_tokens, num_experts, top_k):
    for seed in range(2):
        experts, separate = different_experts(ffn, num_experts, seed)
        layer = make_layer(experts, top_k=top_k, seed=seed)
        hidden = torch.randn(num_tokens, WIDTH)
        expected = moe_forward(hidden, layer.router(hidden), separate, top_k)
        torch.testing.assert_close(layer(hidden), expected, rtol=1e-4, atol=1e-6)


def test_layer_with_capacity_equals_the_plain_loop_in_training():
    experts, separate = different_experts("gated", 4, 0)
    layer = make_layer(experts, top_k=2, policy="deepspeed", capacity_factor=0.75).train()
    hidden = torch.randn(16, WIDTH)
    with layer.recorder.open() as routings:
        found = layer(hidden)
    assert routings[3].dropped.any()
    expected = moe_forward(hidden, layer.router(hidden), separate, 2, capacity=6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_dropped_in_evaluation():
    experts, _ = different_experts("gated", 4, 0)
    layer = make_layer(experts, policy="deepspeed", capacity_factor=0.25).eval()
    with layer.recorder.open() as routings:
        layer(torch.randn(16, WIDTH))
    assert routings[3].dropped is None


def test_permuting_tokens_permutes_outputs():
    experts, _ = different_experts("gated", 4, 1)
    layer = make_layer(experts)
    hidden, order = torch.randn(20, WIDTH), torch.randperm(20)
    torch.testing.assert_close(layer(hidden)[order], layer(hidden[order]))


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_equal_those_of_the_plain_loop(top_k):
    experts, separate = different_experts("gated", 3, 2)
    layer = make_layer(experts, top_k=top_k)
    hidden = torch.randn(9, WIDTH)
    layer(hidden).square().sum().backward()
    moe_forward(hidden, layer.router(hidden).detach(), separate, top_k).square().sum().backward()
    for name in experts.projection_names:
        found = experts.get_parameter(name).grad
        for expert, module in enumerate(separate):
            expected = module.get_submodule(name).weight.grad
            expected = torch.zeros_like(found[expert]) if expected is None else expected
            torch.testing.assert_close(found[expert], expected, rtol=1e-4, atol=1e-6)


def send_all_to(layer, expert):
    """Make the router prefer one expert whatever the token."""
    with torch.no_grad():
        layer.router.weight.zero_()
    layer.router.register_forward_hook(lambda *_: 100 * nn.functional.one_hot(torch.tensor([expert] * 5), 4).float())


def test_all_tokens_to_one_expert_leaves_zero_gradients_for_the_others():
    experts, separate = different_experts("gated", 4, 3)
    layer = make_layer(experts, top_k=1)
    send_all_to(layer, 2)
    hidden = torch.randn(5, WIDTH)
    output = layer(hidden)
    torch.testing.assert_close(output, separate[2](hidden))
    output.sum().backward()
    norms = experts.gate_proj.grad.flatten(1).norm(dim=1)
    assert norms[2] > 0
    assert norms[[0, 1, 3]].tolist() == [0, 0, 0]


def test_no_token_at_all_still_gives_every_parameter_a_gradient():
    experts, _ = different_experts("gated_with_bias", 4, 0)
    layer = make_layer(experts)
    layer(torch.zeros(0, WIDTH)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_padding_never_reaches_the_router():
    experts, _ = different_experts("gated", 4, 0)
    layer = make_layer(experts)
    hidden = torch.randn(2, 3, WIDTH)
    token_mask = torch.tensor([[False, True, True], [True, True, True]])
    with layer.recorder.open(token_mask=token_mask) as routings:
        output = layer(hidden)
        assert layer.recorder.token_rows is layer.recorder.token_rows, "the device is asked once for all layers"
    assert routings[3].expert_ids.shape == (5, 2)
    assert torch.equal(output[0, 0], torch.zeros(WIDTH))
    torch.testing.assert_close(output[token_mask], layer(hidden[token_mask]))


def test_a_closed_recorder_keeps_nothing():
    experts, _ = different_experts("gated", 2, 0)
    layer = make_layer(experts)
    with layer.recorder.open() as routings:
        layer(torch.randn(3, WIDTH))
    layer(torch.randn(7, WIDTH))
    assert routings[3].expert_ids.shape == (3, 2)


def test_a_recorder_cannot_be_opened_twice():
    recorder = RoutingRecorder()
    with recorder.open(), pytest.raises(RuntimeError, match=r"open already"), recorder.open():
        pass


def test_a_recorder_closes_after_an_error():
    recorder = RoutingRecorder()
    with pytest.raises(KeyError), recorder.open(token_mask=torch.ones(1, 1)):
        raise KeyError
    assert not recorder.is_open
    assert recorder.token_mask is None


def test_the_router_computes_in_float32_under_autocast():
    router = Router(WIDTH, 4)
    hidden = torch.randn(3, WIDTH).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ router.weight.T)


def test_router_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = Router(WIDTH, 4, seed=5).weight
    torch.manual_seed(2)
    assert torch.equal(first, Router(WIDTH, 4, seed=5).weight)
    assert not torch.equal(first, Router(WIDTH, 4, seed=6).weight)


def test_random_routing_ignores_tokens_is_repeatable_and_ends():
    experts, _ = different_experts("gated", 4, 0)
    layer = make_layer(experts, top_k=1).eval()
    hidden = torch.randn(64, WIDTH)
    trained = layer(hidden)
    with random_routing(layer, seed=1):
        first = layer(hidden)
    with random_routing(layer, seed=1):
        second = layer(hidden)
    assert torch.equal(first, second)
    assert not torch.allclose(first, trained)
    assert torch.equal(layer(hidden), trained)


def test_random_routing_of_a_dense_model_is_refused():
    with pytest.raises(ValueError, match=r"no router"), random_routing(PlainFFN()):
        pass


def test_an_unknown_feed_forward_network_is_refused_with_the_known_ones():
    unknown = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH))
    with pytest.raises(ValueError, match=r"Sequential with 0/1 .* known .* gate_proj/up_proj/down_proj, fc1/fc2"):
        StackedExperts.from_dense(unknown, num_experts=2)


def test_a_network_with_a_hidden_factor_is_refused():
    class Scaled(PlainFFN):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(ValueError, match=r"computes something else"):
        StackedExperts.from_dense(Scaled(), num_experts=2)


RANDOM = {
    "jitter": {"jitter": 0.5},
    "random_drops": {
        "policy": "deepspeed",
        "capacity_factor": 0.5,
        "eval_capacity_factor": 0.5,
        "drop_order": "random",
    },
    "sampled_second_choice": {"policy": "deepspeed", "capacity_factor": 8.0, "sample_second_choice": True},
}


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_random_is_so_in_training_only(name):
    experts, _ = different_experts("gated", 4, 0)
    layer = make_layer(experts, top_k=2, **RANDOM[name])
    hidden = torch.randn(32, WIDTH)
    assert not torch.equal(layer.train()(hidden), layer(hidden))
    assert torch.equal(layer.eval()(hidden), layer(hidden))


def test_the_evaluation_capacity_is_its_own():
    experts, _ = different_experts("gated", 4, 0)
    layer = make_layer(experts, policy="deepspeed", capacity_factor=8.0, eval_capacity_factor=0.5)
    dropped = []
    for is_training in (True, False):
        with layer.train(is_training).recorder.open() as routings:
            layer(torch.randn(16, WIDTH))
        dropped.append(bool(routings[3].dropped.any()))
    assert dropped == [False, True]


@pytest.mark.parametrize(
    "options",
    [
        {"score": "sigmoid", "weight_scale": 2.0},
        {"normalise_weights": False},
        {"policy": "deepspeed", "capacity_factor": 0.5},
    ],
)
def test_in_evaluation_a_token_does_not_depend_on_its_batch_mates(options):
    experts, _ = different_experts("gated", 4, 0)
    layer = make_layer(experts, top_k=2, **options).eval()
    hidden = torch.randn(12, WIDTH)
    alone = torch.cat([layer(row) for row in hidden.split([5, 1, 6])])
    torch.testing.assert_close(layer(hidden), alone)
