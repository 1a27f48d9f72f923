"""A sparse layer with fused kernels is the plain layer: values, gradients, routing records, whatever the options."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moevlm.models.moe.experts import Projection, StackedExperts
from moevlm.models.moe.lora_experts import LoRAExperts
from moevlm.models.moe.moe_layer import SparseMoE
from moevlm.models.moe.recorder import RoutingRecorder
from moevlm.models.moe.router import Router, random_routing
from moevlm.models.moe.settings import MoESettings
from moevlm.models.upcycling import upcycle
from tests.models.ffns import WIDTH, different_experts
from tests.tiny import tiny_batch, tiny_vlm

OPTIONS = {
    "top-1": {"top_k": 1},
    "top-2": {"top_k": 2},
    "all": {"top_k": 4},
    "sigmoid, scaled": {"top_k": 2, "score": "sigmoid", "weight_scale": 2.5},
    "raw weights": {"top_k": 2, "normalise_weights": False},
    "capacity": {"top_k": 2, "policy": "deepspeed", "capacity_factor": 0.5},
    "capacity, top-1": {"top_k": 1, "policy": "deepspeed", "capacity_factor": 0.75},
    "bias": {"top_k": 2, "bias_update_rate": 0.1},
    "jitter": {"top_k": 2, "jitter": 0.2},
}


def pair(top_k: int, **options: object) -> tuple[SparseMoE, SparseMoE]:
    experts, _ = different_experts("gated", 4, 0)
    rates = {key: options[key] for key in ("jitter", "bias_update_rate") if key in options}
    layers = []
    for kernel in ("fused", "plain"):
        router = Router(WIDTH, 4, init_std=1.0, **rates)  # type: ignore[arg-type]
        settings = MoESettings(num_experts=4, top_k=top_k, kernel=kernel, **options)  # type: ignore[arg-type]
        own = copy.deepcopy(experts)
        layers.append(SparseMoE(router, own, settings=settings, layer_index=0, recorder=RoutingRecorder()))
    return layers[0], layers[1]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fused_equals_plain(options: dict) -> None:
    results = []
    for layer in pair(**options):
        torch.manual_seed(3)
        hidden = torch.randn(2, 41, WIDTH).requires_grad_()
        with layer.recorder.open() as routings:
            output = layer(hidden)
        total = output.square().sum() + routings[0].router_logits.square().sum() + routings[0].router_probs.pow(2).sum()
        total.backward()
        results.append((output.detach(), hidden.grad, *(parameter.grad for parameter in layer.parameters())))
        results[-1] += (routings[0].expert_ids, routings[0].expert_weights.detach())
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["experts", "router"])
def test_a_frozen_part_gets_no_gradient(frozen: str) -> None:
    layer, _ = pair(top_k=2)
    layer.get_submodule(frozen).requires_grad_(False)
    layer(torch.randn(70, WIDTH)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name


def test_padding_is_not_routed() -> None:
    fused, plain = pair(top_k=2)
    hidden, mask = torch.randn(2, 5, WIDTH), torch.tensor([[True] * 5, [True, True, False, False, False]])
    results = []
    for layer in (fused, plain):
        with layer.recorder.open(mask), torch.no_grad():
            results.append(layer(hidden))
    torch.testing.assert_close(*results)
    assert not results[0][~mask].any()


def test_autocast_runs_the_experts_in_its_dtype_and_the_router_in_float32() -> None:
    layer, _ = pair(top_k=2)
    hidden = torch.randn(80, WIDTH).requires_grad_()
    exact = layer(hidden).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16), layer.recorder.open() as routings:
        output = layer(hidden)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert routings[0].router_logits.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    assert (output - exact).norm() < 2e-2 * exact.norm()


def test_random_routing_reaches_the_fused_layer() -> None:
    layer, plain = pair(top_k=2)
    hidden = torch.randn(30, WIDTH)
    results = []
    for one in (layer, plain):
        with random_routing(one), torch.no_grad():
            results.append(one(hidden))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], layer(hidden), atol=1e-3)


@pytest.mark.parametrize("ffn", ["plain", "gated_with_bias"])
def test_experts_that_kernels_do_not_compute_are_refused_by_fused_and_run_by_auto(ffn: str) -> None:
    experts, _ = different_experts(ffn, 4, 0)
    parts = {"layer_index": 0, "recorder": RoutingRecorder()}
    with pytest.raises(ValueError, match=r"kernel fused computes .* without biases, got 4 .*set model.moe.kernel=auto"):
        SparseMoE(Router(WIDTH, 4), experts, settings=MoESettings(num_experts=4, kernel="fused"), **parts)
    layer = SparseMoE(Router(WIDTH, 4), experts, settings=MoESettings(num_experts=4), **parts)
    assert not layer.can_fuse


def test_gelu_and_low_rank_experts_are_not_fused() -> None:
    experts, _ = different_experts("gated", 4, 0)
    assert experts.is_swiglu
    experts.activation = nn.GELU()
    assert not experts.is_swiglu
    layers = upcycle(tiny_vlm(), num_experts=4, experts="lora", lora_rank=2).moe_layers.values()
    assert all(isinstance(layer.experts, LoRAExperts) and not layer.can_fuse for layer in layers)


def test_on_a_cpu_auto_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair(top_k=2)

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(SparseMoE, "_route_fused", refuse)
    plain.use_kernel("auto")
    plain(torch.randn(3, WIDTH))
    with pytest.raises(AssertionError):
        fused(torch.randn(3, WIDTH))


def test_torch_compile_leaves_the_fused_layer_as_it_is() -> None:
    layer, _ = pair(top_k=2)
    hidden = torch.randn(70, WIDTH)
    expected = layer(hidden)
    found = torch.compile(nn.Sequential(nn.Identity(), layer), backend="eager")(hidden)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert layer.router.weight.grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [4, 64])
def test_on_a_gpu_auto_is_fused_and_equals_plain(num_experts: int) -> None:
    width, inner = 256, 344
    torch.manual_seed(0)
    names = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    parts = [Projection(name, torch.randn(num_experts, *size) * size[1] ** -0.5, None) for name, size in names.items()]
    hidden = torch.randn(999, width, device="cuda", dtype=torch.bfloat16)
    results = []
    for kernel in ("auto", "plain"):
        settings = MoESettings(num_experts=num_experts, kernel=kernel)
        experts = StackedExperts([part._replace(weight=part.weight.clone()) for part in parts], nn.SiLU()).bfloat16()
        router = Router(width, num_experts, init_std=0.2)
        layer = SparseMoE(router, experts, settings=settings, layer_index=0, recorder=RoutingRecorder()).cuda()
        own = hidden.clone().requires_grad_()
        output = layer(own)
        output.float().square().sum().backward()
        few = layer(hidden[:7].clone())
        results.append((output, own.grad, few, *(parameter.grad for parameter in layer.parameters())))
    for found, expected in zip(*results):
        assert (found.float() - expected.float()).norm() < 2e-2 * expected.float().norm()


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": "selective"}, {"gradient_checkpointing": "full"}])
def test_a_model_of_fused_layers_is_the_plain_one_under_any_checkpointing(options: dict) -> None:
    batch, results = tiny_batch(("siqqaa", "sqqaaa", "iqaqa")), []
    for kernel in ("fused", "plain"):
        vlm = tiny_vlm(
            {"num_experts": 4, "top_k": 2, "kernel": kernel}, **(options if kernel == "fused" else {})
        ).train()
        output = vlm(batch)
        total = output.hidden_states.square().mean()
        total = total + sum(routing.router_probs.pow(2).mean() for routing in output.routings.values())
        total.backward()
        gradients = {name: parameter.grad for name, parameter in vlm.named_parameters() if parameter.grad is not None}
        results.append({"hidden": output.hidden_states.detach(), **gradients})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-3, atol=1e-6, msg=name)
