"""The maps of a decode step: Triton kernels, interpreted on a CPU, against PyTorch, and PyTorch against plain loops."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moevlm.ops.decode import Choices, gated_ffn, linear, rms_norm, route
from moevlm.ops.decode_attention import attend
from moevlm.ops.routing import top_k_routing


def test_gated_ffn_is_the_weighted_sum_over_a_tokens_choices() -> None:
    torch.manual_seed(0)
    x_BD, norm_D = torch.randn(3, 8), torch.rand(8) + 0.5
    gate_EFD, up_EFD, down_EDF = torch.randn(4, 6, 8), torch.randn(4, 6, 8), torch.randn(4, 8, 6)
    choices = Choices(torch.tensor([[2, 0], [-1, -1], [3, 1]], dtype=torch.int32), torch.rand(3, 2))
    found = gated_ffn(x_BD, gate_EFD, up_EFD, down_EDF, choices, norm_D=norm_D, eps=1e-6, residual_BD=x_BD)
    expected = x_BD.clone()
    for row in (0, 2):
        h_D = rms_norm(x_BD[row], norm_D, 1e-6)
        for expert, weight in zip(choices.ids[row].tolist(), choices.weights[row]):
            hidden_F = torch.nn.functional.silu(gate_EFD[expert] @ h_D) * (up_EFD[expert] @ h_D)
            expected[row] += weight * (down_EDF[expert] @ hidden_F)
    assert_close(found, expected)


def test_route_is_top_k_routing_of_the_normed_tokens_that_run() -> None:
    torch.manual_seed(0)
    x_BD, norm_D, router_ED = torch.randn(5, 8), torch.rand(8), torch.randn(4, 8)
    running_B = torch.tensor([True, False, True, True, True])
    options: dict[str, Any] = {"top_k": 2, "score": "sigmoid", "normalise": False}
    found = route(x_BD, router_ED, running_B, norm_D=norm_D, eps=1e-6, weight_scale=2.0, **options)
    expected = top_k_routing(rms_norm(x_BD, norm_D, 1e-6) @ router_ED.T, **options)
    assert torch.equal(found.ids[running_B], expected.expert_ids[running_B].int())
    assert bool((found.ids[1] == -1).all())
    assert_close(found.weights, 2 * expected.expert_weights)


@pytest.mark.parametrize("window", [None, 3])
def test_attend_is_softmax_over_the_columns_from_a_rows_start_to_its_new_token(window: int | None) -> None:
    torch.manual_seed(0)
    heads, key_heads, length, head = 4, 2, 12, 16
    qkv_BN = torch.randn(2, (heads + 2 * key_heads) * head)
    keys, values = torch.randn(2, key_heads, length, head), torch.randn(2, key_heads, length, head)
    starts_B, position = torch.tensor([2, 0]), torch.tensor([7])
    angles_Ld = torch.rand(length, head // 2).repeat(1, 2)
    options: dict[str, Any] = {"cos_Ld": angles_Ld.cos(), "sin_Ld": angles_Ld.sin(), "window": window}
    before = keys.clone()
    found = attend(qkv_BN, keys, values, starts_B, position, num_heads=heads, scaling=0.3, **options)
    for row in range(2):
        angle_d = angles_Ld[7 - starts_B[row]]
        states = qkv_BN[row].view(-1, head)
        turned = torch.cat([-states[:, 8:], states[:, :8]], dim=1)
        rotated = states * angle_d.cos() + turned * angle_d.sin()
        first = int(starts_B[row]) if window is None else max(int(starts_B[row]), 7 - window + 1)
        for number in range(heads):
            other = number // 2
            seen = torch.cat([before[row, other, first:7], rotated[heads + other][None]])
            told = torch.cat([values[row, other, first:7], states[heads + key_heads + other][None]])
            expected = torch.softmax(0.3 * seen @ rotated[number], dim=0) @ told
            assert_close(found[row, number * head : (number + 1) * head], expected, rtol=1e-4, atol=1e-5)
        assert_close(keys[row, :, 7], rotated[heads : heads + key_heads])
    assert torch.equal(keys[:, :, 8:], before[:, :, 8:])


def compare_kernels(device: str, dtype: torch.dtype, tolerance: float, batches: tuple[int, ...] = (1, 2, 20)) -> None:
    """Every kernel with every option against PyTorch, odd sizes included."""
    torch.manual_seed(0)
    for rows in batches:
        _compare_maps(rows, device, dtype, tolerance)
    for case in ((1, 2, 2, 16, None), (3, 3, 1, 32, 7)):
        _compare_attention(*case, device, dtype, tolerance)


def _compare_maps(rows: int, device: str, dtype: torch.dtype, tolerance: float) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    def check(function: Any, *arguments: Any, **options: Any) -> None:
        plain = function(*arguments, plain=True, **options)
        assert_close(function(*arguments, **options), plain, rtol=tolerance, atol=tolerance)

    x_BD, norm = draw(rows, 48), {"norm_D": draw(48), "eps": 1e-6}
    parts = [draw(size, 48) * 0.2 for size in (32, 20, 24)]
    check(linear, x_BD, parts, [draw(len(part)) for part in parts], **norm)
    check(linear, x_BD, parts[:1], [None], residual_BN=draw(rows, 32), dtype=torch.float32)
    running_B = (torch.arange(rows) != 1).to(device)
    gate, up, down = draw(3, 36, 48) * 0.2, draw(3, 36, 48) * 0.2, draw(3, 48, 36) * 0.2
    bias = torch.randn(3).to(device)
    for top_k, score, normalise, bias_E in (
        (1, "softmax", True, None),
        (2, "softmax", False, bias),
        (3, "sigmoid", True, None),
    ):
        options: dict[str, Any] = {**norm, "top_k": top_k, "score": score, "normalise": normalise, "weight_scale": 1.5}
        arguments = (x_BD, torch.randn(3, 48).to(device), running_B)
        expected = route(*arguments, selection_bias_E=bias_E, plain=True, **options)
        found = route(*arguments, selection_bias_E=bias_E, **options)
        assert torch.equal(found.ids, expected.ids)
        assert_close(found.weights, expected.weights, rtol=1e-3, atol=1e-4)
        check(gated_ffn, x_BD, gate, up, down, expected, residual_BD=x_BD, **norm)
    check(gated_ffn, x_BD, gate[:1], up[:1], down[:1], None)


def _compare_attention(
    rows: int,
    heads: int,
    key_heads: int,
    head: int,
    window: int | None,
    device: str,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    length = 150
    qkv_BN = torch.randn(rows, (heads + 2 * key_heads) * head).to(device, dtype)
    keys, values = (torch.randn(rows, key_heads, length, head).to(device, dtype) for _ in range(2))
    starts_B, position = torch.tensor([5, 0, 40])[:rows].to(device), torch.tensor([130]).to(device)
    angles_Ld = torch.rand(length, head // 2).repeat(1, 2).to(device)
    norm = {"query_norm_d": torch.rand(head).to(device, dtype), "key_norm_d": torch.rand(head).to(device, dtype)}
    options: dict[str, Any] = {"num_heads": heads, "scaling": head**-0.5, "window": window, "eps": 1e-6}
    options |= {"cos_Ld": angles_Ld.cos().to(dtype), "sin_Ld": angles_Ld.sin().to(dtype), **(norm if window else {})}
    caches = [(keys.clone(), values.clone()) for _ in range(2)]
    found = attend(qkv_BN, *caches[0], starts_B, position, **options)
    expected = attend(qkv_BN, *caches[1], starts_B, position, plain=True, **options)
    assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert_close(caches[0], caches[1], rtol=tolerance, atol=tolerance)


INTERPRETED = """
import moevlm.ops.decode, moevlm.ops.decode_attention
moevlm.ops.decode.has_kernels = moevlm.ops.decode_attention.has_kernels = lambda device: True
import torch
from tests.ops.test_decode import compare_kernels
compare_kernels("cpu", torch.float32, 1e-4, batches=(1, 3))
"""


def test_kernels_agree_with_pytorch_when_interpreted() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when kernels are defined, so a process of its own
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 1.5e-1)])
def test_kernels_agree_with_pytorch_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    compare_kernels("cuda", dtype, tolerance)
