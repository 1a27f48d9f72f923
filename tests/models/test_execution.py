"""However the layers are run, they compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from moevlm.batch import VLMBatch
from moevlm.models.execution import checkpoint_policies
from moevlm.models.vlm import VLM
from tests.tiny import NUM_LAYERS, tiny_batch, tiny_vlm

MOE = {"num_experts": 4, "top_k": 2, "placement": "second_half"}
OTHER_LENGTHS = ("sqa", "siqqqqaaa", "iqaqa", "sqqqqaaaaaa")


def gradients(vlm: VLM, batch: VLMBatch) -> dict[str, torch.Tensor]:
    vlm.zero_grad()
    output = vlm(batch)
    balance = sum(routing.router_probs.square().mean() for routing in output.routings.values())
    (output.hidden_states.square().mean() + balance).backward()
    return {name: parameter.grad for name, parameter in vlm.named_parameters() if parameter.grad is not None}


def assert_same_gradients(changed: VLM, plain: VLM) -> None:
    for letters in (("siqqaa", "sqqaaa"), OTHER_LENGTHS):
        batch = tiny_batch(letters)
        expected, found = gradients(plain, batch), gradients(changed, batch)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("policy", ["full", "selective", ["selective", "off", "full"]])
@pytest.mark.parametrize("moe", [None, MOE])
def test_no_policy_changes_a_gradient(moe, policy) -> None:
    assert_same_gradients(tiny_vlm(moe, gradient_checkpointing=policy), tiny_vlm(moe))


def saved_numbers(policy: str) -> int:
    """Numbers that a forward pass keeps for the backward pass, parameters excepted."""
    vlm, kept = tiny_vlm(gradient_checkpointing=policy), []
    parameters = {parameter.data_ptr() for parameter in vlm.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vlm(tiny_batch())
    return sum(kept)


def test_full_checkpointing_keeps_least() -> None:
    assert saved_numbers("full") < 0.5 * saved_numbers("off")


def test_selective_checkpointing_multiplies_no_matrix_twice() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    for policy in ("off", "full", "selective"):
        vlm = tiny_vlm(vision=None, gradient_checkpointing=policy)
        with FlopCounterMode(display=False) as counter:
            gradients(vlm, tiny_batch(("sqqqaaaqqq",)))
        counts[policy] = counter.get_total_flops()
    assert counts["selective"] == counts["off"] < counts["full"]


def test_policies_repeat_over_the_layers() -> None:
    assert checkpoint_policies(True, 2) == ["full", "full"]
    assert checkpoint_policies(False, 2) == ["off", "off"]
    assert checkpoint_policies(["full", "off"], 5) == ["full", "off", "full", "off", "full"]


@pytest.mark.parametrize("setting", ["sometimes", [], ["full", "some"]])
def test_unknown_policies_are_refused(setting) -> None:
    with pytest.raises(ValueError, match=r"gradient_checkpointing must be .*set model.gradient_checkpointing"):
        checkpoint_policies(setting, 2)


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention must be one of .*got 'flash'; set model.attention"):
        tiny_vlm(attention="flash")


@pytest.fixture
def counter(monkeypatch) -> CompileCounter:
    """Compiled layers run eagerly, so that nothing is handed to a C++ compiler; graphs are counted."""
    torch._dynamo.reset()
    counter, compile_module = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compile_module(module, backend=counter, **options)
    )
    return counter


@pytest.mark.untraced  # tracing doubles the time of compiling
@pytest.mark.parametrize(
    ("moe", "policy"),
    [
        (MOE, "off"),
        pytest.param(None, "selective", marks=pytest.mark.slow),
        pytest.param(MOE, "full", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_give_the_same_gradients(counter, moe, policy) -> None:
    plain = tiny_vlm(moe)
    changed = tiny_vlm(moe, compile=True, gradient_checkpointing=policy)
    assert changed.state_dict().keys() == plain.state_dict().keys()
    assert_same_gradients(changed, plain)
    assert counter.frame_count > 0


@pytest.mark.untraced  # tracing doubles the time of compiling
@pytest.mark.parametrize("moe", [pytest.param(None, marks=pytest.mark.slow), MOE])
def test_another_batch_compiles_nothing(counter, moe) -> None:
    vlm = tiny_vlm(moe, compile=True)
    gradients(vlm, tiny_batch(("siqqaa", "sqqaaa", "iqa")))
    before = counter.frame_count
    assert before < 4 * NUM_LAYERS  # layers share their code
    for seed in range(4):
        gradients(vlm, tiny_batch([*OTHER_LENGTHS, "sq" + "a" * seed], seed=seed))
    assert counter.frame_count == before


def test_a_frozen_vision_encoder_keeps_nothing_for_a_backward_pass() -> None:
    vlm = tiny_vlm(gradient_checkpointing=True)
    plain = copy.deepcopy(vlm)
    vlm.vision_encoder.requires_grad_(False)
    found, expected = gradients(vlm, tiny_batch()), gradients(plain, tiny_batch())
    assert not vlm._visual_features(tiny_batch(), "default").requires_grad
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
