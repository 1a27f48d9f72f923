"""The attention kernel for any length: when it is taken, and what it is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from moevlm.models import varlen
from moevlm.models.attention import PackedSequences, packed_attention
from moevlm.models.varlen import check_kernel, takes_varlen
from tests.tiny import tiny_batch, tiny_vlm

LENGTHS = (5, 1, 9, 3)


def stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch documents of its `varlen_attn`, by a mask over the whole row."""
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    places = torch.arange(query.shape[0], device=query.device)
    owners = torch.searchsorted(cu_seq_q[1:].contiguous(), places.int(), right=True)
    distance = places[:, None] - places[None, :]
    mask = (owners[:, None] == owners[None, :]) & (distance >= 0)
    if window_size[0] >= 0:
        mask &= distance <= window_size[0]
    states = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    output = scaled_dot_product_attention(*states, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return output[0].transpose(0, 1)


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(varlen, "ARGUMENTS", frozenset({"scale", "window_size", "enable_gqa"}))


def draw(device: str = "cpu", heads: int = 4, key_heads: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, number, sum(LENGTHS), 16) for number in (heads, key_heads, key_heads)]
    return [torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in shapes]


def attend(kernel: str, states: list[torch.Tensor], **options) -> tuple[torch.Tensor, ...]:
    module = nn.Module()
    module.num_key_value_groups = states[0].shape[1] // states[1].shape[1]
    packed = PackedSequences(LENGTHS, states[0].device, kernel=kernel)
    assert (packed.ends is not None) == (kernel == "varlen")
    output, _ = packed_attention(module, *states, None, packed_sequences=packed, **options)
    assert packed.reached_attention
    weight = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return (output, *torch.autograd.grad((output * weight).sum(), states))


OPTIONS = [{}, {"scaling": 0.5}, {"sliding_window": 3}, {"sliding_window": 100}]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_kernel_is_given_what_the_padded_path_computes(on_cpu, options, key_heads) -> None:
    states = draw(key_heads=key_heads)
    for found, expected in zip(attend("varlen", states, **options), attend("padded", states, **options)):
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("arguments", [{"is_causal"}, {"window_size"}, {"scale", "window_size"}])
def test_arguments_that_a_torch_lacks_are_made_up_for(on_cpu, monkeypatch, arguments) -> None:
    def older(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, **options):
        assert set(options) | ({"is_causal"} if is_causal else set()) == arguments
        return stand_in(query, key, value, cu_q, cu_k, max_q, max_k, **{"window_size": (-1, 0), **options})

    states = draw(key_heads=2)
    expected = attend("padded", states, scaling=0.5)
    monkeypatch.setattr(varlen, "varlen_attn", older)
    monkeypatch.setattr(varlen, "ARGUMENTS", frozenset(arguments))
    for found, other in zip(attend("varlen", states, scaling=0.5), expected):
        torch.testing.assert_close(found, other, rtol=3e-2, atol=3e-2)


def test_under_autocast_the_kernel_takes_float32_states_as_autocasts_own(on_cpu, monkeypatch) -> None:
    """A decoder's rotary embedding gives float32: these were padded, silently."""
    seen = []

    def watched(query, *args, **options):
        seen.append(query.dtype)
        return stand_in(query, *args, **options)

    monkeypatch.setattr(varlen, "varlen_attn", watched)
    states = [state.detach().float().requires_grad_() for state in draw()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [attend(kernel, states) for kernel in ("varlen", "padded")]
    assert seen == [torch.bfloat16]
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_torchs_kernel_equals_the_padded_path(options, key_heads) -> None:
    states = draw("cuda", key_heads=key_heads)
    for found, expected in zip(attend("varlen", states, **options), attend("padded", states, **options)):
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": "selective"}, {"gradient_checkpointing": "full"}])
@pytest.mark.parametrize("moe", [None, {"num_experts": 4, "top_k": 2, "placement": "second_half"}])
def test_a_compiled_model_on_a_gpu_computes_what_the_padded_one_does(moe, options) -> None:
    plain, changed = tiny_vlm(moe, attention="padded"), tiny_vlm(moe, attention="varlen", compile=True, **options)
    plain, changed = plain.cuda(), changed.cuda()
    for letters in (("siqqaa", "sqqaaa", "iqaqa"), ("sqa", "siqqqqaaa")):
        batch = tiny_batch(letters).to("cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            results = [run(model, batch) for model in (changed, plain)]
        for found, expected in zip(*results):
            error = (found - expected).float().norm() / expected.float().norm()
            assert error < 5e-2


@pytest.mark.parametrize(
    "changes",
    [{"softcap": 5.0}, {"dropout": 0.1}, {"dtype": torch.float32}, {"width": 12}, {"value_width": 8}],
    ids=str,
)
def test_what_the_kernel_cannot_do_is_padded(changes) -> None:
    given = {"softcap": None, "dropout": 0.0, "dtype": torch.bfloat16, "width": 16, **changes}
    query = torch.zeros(1, 2, 3, given["width"], dtype=given["dtype"])
    value = query[..., : given.get("value_width", given["width"])]
    options = {"dropout": given["dropout"], "sliding_window": None, "softcap": given["softcap"]}
    assert not takes_varlen(torch.zeros(2), query, value, **options)


def test_kernels_are_chosen_by_name_and_device(on_cpu, monkeypatch) -> None:
    device = torch.device("cpu")
    assert [check_kernel(kernel, device) for kernel in varlen.KERNELS] == [True, True, False]
    monkeypatch.setattr(varlen, "varlen_attn", None)
    assert not check_kernel("auto", device)
    with pytest.raises(ValueError, match=r"attention=varlen needs a GPU and torch\.nn\.attention\.varlen, .* on cpu"):
        check_kernel("varlen", device)


def run(vlm, batch, keep=()) -> list[torch.Tensor]:
    vlm.zero_grad()
    output = vlm(batch, keep_attentions=keep)
    output.hidden_states.float().square().mean().backward()
    kept = [output.attentions[index].key for index in keep]
    return [output.hidden_states, vlm.connector.layers[0].weight.grad, *kept]


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"compile": True}, marks=pytest.mark.untraced)],  # tracing doubles the time of compiling
)
def test_a_model_computes_the_same_by_either_kernel(on_cpu, monkeypatch, options) -> None:
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **given: compile_module(module, backend="eager", **given)
    )
    plain = tiny_vlm(dtype="bfloat16", attention="padded")
    changed = tiny_vlm(dtype="bfloat16", attention="varlen", **options)
    for letters in (("siqqaa", "sqqaaa", "iqaqa"), ("sqa", "siqqqqaaa")):
        for found, expected in zip(run(changed, tiny_batch(letters), [1]), run(plain, tiny_batch(letters), [1])):
            torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
