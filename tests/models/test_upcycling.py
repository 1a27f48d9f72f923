import pytest
import torch

from moevlm.models.moe.settings import MoESettings
from moevlm.models.upcycling import moe_layer_indices, upcycle
from tests.tiny import tiny_batch, tiny_decoder_config, tiny_vlm


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("first_half", [0, 1]),
        ("second_half", [2, 3, 4]),
        ("interval", [0, 2, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ([3, 1], [1, 3]),
    ],
)
def test_placements_name_these_layers(placement, expected):
    assert moe_layer_indices(5, placement) == expected


@pytest.mark.parametrize("placement", ["sparse", [5], [-1], [1, 1], []])
def test_bad_placements_are_refused(placement):
    with pytest.raises(ValueError, match=r"set model.moe.placement"):
        moe_layer_indices(5, placement)


def test_the_router_learns_from_the_task_at_top_1():
    vlm = tiny_vlm({"num_experts": 4, "top_k": 1, "router_init_std": 1.0})
    vlm(tiny_batch()).hidden_states.square().sum().backward()
    assert vlm.moe_layers[0].router.weight.grad.norm() > 1e-3


def test_experts_may_differ_in_number_from_layer_to_layer():
    vlm = tiny_vlm({"num_experts": [2, 4], "top_k": 2, "placement": [1, 3]})
    assert {index: layer.num_experts for index, layer in vlm.moe_layers.items()} == {1: 2, 3: 4}


def test_routers_depend_on_seed_and_layer_and_nothing_else():
    first, second = (tiny_vlm({"num_experts": 4, "top_k": 1, "seed": 3}) for _ in range(2))
    other = tiny_vlm({"num_experts": 4, "top_k": 1, "seed": 4})
    weights = [vlm.moe_layers[0].router.weight for vlm in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], first.moe_layers[2].router.weight)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router_init_std": None, "residual": True},
        {"initialisation": "noise", "init_noise": 0.1},
        {"initialisation": "drop_upcycling", "reinit_fraction": 0.5},
        {"experts": "lora", "lora_rank": 2},
    ],
)
def test_weights_are_drawn_on_the_cpu_whatever_the_default_device(options):
    """Lightning builds a model under the GPU as default device, where a generator of the CPU is refused."""
    dense = {"num_experts": 4, "top_k": 2, **options}
    expected = tiny_vlm(dense).state_dict()
    vlm = tiny_vlm()
    with torch.device("meta"):
        upcycle(vlm, **dense)
    found = vlm.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_feed_forward_networks_change():
    dense, sparse = tiny_vlm(), tiny_vlm({"num_experts": 2, "top_k": 1, "placement": [1]})
    others = {name: tensor for name, tensor in dense.state_dict().items() if "layers.1.mlp" not in name}
    found = sparse.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in others.items())
    added = {name.split(".mlp.")[1] for name in found.keys() - others.keys()}
    assert added == {"router.weight", "experts.gate_proj", "experts.up_proj", "experts.down_proj"}


def test_tied_embeddings_stay_tied():
    vlm = tiny_vlm({"num_experts": 2, "top_k": 1})
    assert vlm.head.weight is vlm.language_model.get_input_embeddings().weight


def test_the_model_says_how_it_was_made():
    settings = {"num_experts": 4, "top_k": 2, "placement": "second_half", "jitter": 0.1, "router_init_std": None}
    expected = {**settings, "num_experts": [4, 4], "placement": [2, 3]}
    assert tiny_vlm(settings).moe == MoESettings(**expected).as_dict()
    assert tiny_vlm().moe is None


def test_a_sparse_model_is_not_upcycled_again():
    with pytest.raises(ValueError, match=r"sparse already, in layers \[0, 2\]"):
        upcycle(tiny_vlm({"num_experts": 2, "top_k": 1}), num_experts=2)


def test_a_failed_upcycling_leaves_the_model_dense():
    vlm = tiny_vlm()
    with pytest.raises(ValueError, match="top_k must lie in"):
        upcycle(vlm, num_experts=[4, 1], top_k=2)
    assert vlm.moe is None


def test_as_many_expert_counts_as_layers_are_wanted():
    with pytest.raises(ValueError, match="num_experts lists 3 layers, placement 'interval' has 2"):
        upcycle(tiny_vlm(), num_experts=[2, 2, 2])


def test_a_decoder_with_unknown_feed_forward_networks_is_refused():
    vlm = tiny_vlm(language_model=tiny_decoder_config("gpt2", num_hidden_layers=2))
    with pytest.raises(ValueError, match="GPT2MLP with c_fc/c_proj/act/dropout cannot be turned into experts"):
        upcycle(vlm, num_experts=2)
