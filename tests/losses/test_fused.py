"""The fused losses against the plain ones, on a GPU or in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from moevlm.batch import IGNORE_INDEX, Head
from moevlm.losses import fused
from moevlm.losses.distillation import WEIGHTINGS, TokenLosses, token_losses
from moevlm.losses.divergences import Divergence
from moevlm.losses.fused import fused_rows, is_fused
from moevlm.losses.language_modeling import cross_entropy
from moevlm.losses.teacher_rows import HeadRows
from moevlm.ops.products import add_product
from moevlm.ops.vocabulary_kernels import scale_in_place
from tests.losses.builders import make_head, make_labels, make_output

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = [{}, {"bias": True}, {"softcap": 5.0}, {"bias": True, "softcap": 3.0, "scale": 2.0}]
WIDE = 5000  # more than a block of columns
FIELDS = ("kd", "lm", "kl", "agreement", "student_entropy", "teacher_entropy")


def draw(num_rows: int, num_student: int, num_teacher: int, dtype=torch.float32, **options) -> tuple:
    """Rows, head, teacher's rows and targets; leaves on the device."""
    torch.manual_seed(num_rows)
    head, teacher_head = make_head(num_student, 16, **options), make_head(num_teacher, 24)
    head, teacher_head = (
        dataclasses.replace(
            one,
            weight=one.weight.detach().to(DEVICE, dtype).requires_grad_(),
            bias=None if one.bias is None else one.bias.detach().to(DEVICE, dtype).requires_grad_(),
        )
        for one in (head, teacher_head)
    )
    rows = torch.randn(num_rows, 16, device=DEVICE, dtype=dtype).requires_grad_()
    teacher = HeadRows(torch.randn(num_rows, 24, device=DEVICE, dtype=dtype), teacher_head, num_student)
    return rows, head, teacher, torch.randint(num_student, (num_rows,), device=DEVICE)


def losses_and_gradients(drawn: tuple, kernel: str, **options) -> tuple[TokenLosses, list[torch.Tensor]]:
    rows, head, teacher, targets = drawn
    leaves = [leaf for leaf in (rows, head.weight, head.bias) if leaf is not None and leaf.requires_grad]
    found = token_losses(rows, head, teacher, targets, kernel=kernel, **options)
    return found, list(torch.autograd.grad(0.5 * found.joint, leaves))


def assert_same(drawn: tuple, rtol: float = 1e-4, atol: float = 2e-5, **options) -> None:
    (plain, plain_grads), (ours, grads) = (losses_and_gradients(drawn, k, **options) for k in ("plain", "fused"))
    torch.testing.assert_close(ours.joint, plain.joint, rtol=rtol, atol=atol)
    for name in FIELDS:
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=rtol, atol=atol)
    for found, expected in zip(grads, plain_grads):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("vocabularies", [(9, 9), (WIDE, WIDE), (WIDE, WIDE - 3), (12, WIDE)])
def test_forward_kl_and_cross_entropy_equal_the_plain_ones_in_value_and_gradient(options, vocabularies) -> None:
    assert_same(draw(5, *vocabularies, **options), kd_weight=0.6, lm_weight=0.3)


DIVERGENCES = [
    {},
    {"temperature": 2.0},
    {"kind": "reverse_kl"},
    {"kind": "jsd", "beta": 0.3, "temperature": 0.5},
    {"kind": "skewed_forward_kl", "skew": 0.2},
    {"kind": "skewed_reverse_kl", "skew": 0.2, "temperature": 2.0},
    {"kind": "total_variation"},
]


@pytest.mark.parametrize("settings", DIVERGENCES, ids=str)
@pytest.mark.parametrize("vocabularies", [(WIDE, WIDE), (30, 27)])
def test_every_divergence_of_distributions_is_the_plain_one(settings, vocabularies) -> None:
    drawn = draw(4, *vocabularies, softcap=5.0)
    assert_same(drawn, divergence=Divergence(**settings), kd_weight=0.6, lm_weight=0.3, weighting="teacher_correctness")


@pytest.mark.parametrize("settings", DIVERGENCES, ids=str)
def test_an_impossible_token_of_the_teacher_is_no_nan(settings) -> None:
    rows, head, teacher, targets = draw(3, 9, 9)
    bias = torch.zeros(9, device=DEVICE)
    bias[4] = -float("inf")
    masked = HeadRows(teacher.hidden_states, dataclasses.replace(teacher.head, bias=bias), 9)
    assert_same((rows, head, masked, targets), divergence=Divergence(**settings))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_of_tokens_is_the_plain_one(weighting) -> None:
    assert_same(draw(4, 30, 28), weighting=weighting, lm_weight=0.5)


def test_a_divergence_without_cross_entropy_needs_no_targets() -> None:
    rows, head, teacher, _ = draw(4, 30, 30)
    assert_same((rows, head, teacher, None))


def test_any_size_of_chunk_gives_the_same_gradients() -> None:
    rows, head, teacher, targets = draw(7, 300, 300, bias=True)
    options = {"teacher_hidden_RD": teacher.hidden_states, "teacher_head": teacher.head, "kd_weight": 1.0}
    found = []
    for size in (1, 3, 7, 100):
        total, statistics, *_ = fused_rows(rows, head, targets, lm_weight=1.0, chunk_size=size, **options)
        found.append([total, *statistics, *torch.autograd.grad(total, [rows, head.weight, head.bias])])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_parameters_give_bfloat16_gradients_near_the_plain_ones() -> None:
    drawn = draw(6, 300, 300, dtype=torch.bfloat16)
    assert_same(drawn, rtol=4e-2, atol=4e-2, lm_weight=0.5)


def test_autocast_gives_float32_gradients_near_the_plain_ones() -> None:
    drawn = draw(6, 300, 300)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_same(drawn, rtol=4e-2, atol=4e-2, lm_weight=0.5)


def test_a_frozen_head_gets_no_gradient_and_a_frozen_student_none_at_all() -> None:
    rows, head, teacher, targets = draw(4, 30, 30)
    frozen = Head(head.weight.detach())
    token_losses(rows, frozen, teacher, targets, lm_weight=1.0, kernel="fused").joint.backward()
    assert rows.grad.abs().sum() > 0
    assert frozen.weight.grad is None
    assert not token_losses(rows.detach(), frozen, teacher, targets, kernel="fused").joint.requires_grad
    with torch.no_grad():
        assert not token_losses(rows, head, teacher, targets, kernel="fused").joint.requires_grad


def test_the_teacher_gets_no_gradient() -> None:
    rows, head, teacher, targets = draw(4, 30, 30)
    teacher.hidden_states.requires_grad_()
    token_losses(rows, head, teacher, targets, kernel="fused").joint.backward()
    assert teacher.hidden_states.grad is None
    assert teacher.head.weight.grad is None


def test_no_rows_give_zero_and_zero_gradients() -> None:
    rows, head, teacher, targets = draw(0, 30, 30, bias=True)
    found = token_losses(rows, head, teacher, targets, lm_weight=1.0, kernel="fused")
    found.joint.backward()
    assert (found.joint.item(), found.kd.shape) == (0.0, (0,))
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))
    assert torch.equal(head.bias.grad, torch.zeros_like(head.bias))


def test_equal_distributions_cost_nothing_and_give_no_gradient() -> None:
    rows, head, _, _ = draw(5, WIDE, WIDE)
    found = token_losses(rows, head, HeadRows(rows.detach(), head, WIDE), kernel="fused")
    found.joint.backward()
    assert found.joint.item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(rows.grad, torch.zeros_like(rows), atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_cross_entropy_over_masked_labels_equals_the_plain_one(options) -> None:
    lengths, results = (5, 2, 9), []
    _, head, _, _ = draw(1, 11, 11, **options)
    labels = make_labels(lengths, 11).to(DEVICE)
    assert (labels == IGNORE_INDEX).any()
    hidden, output = torch.randn(16, 16, device=DEVICE).requires_grad_(), make_output(torch.empty(16, 16), lengths)
    output = dataclasses.replace(output, text_positions=output.text_positions.to(DEVICE), hidden_states=hidden)
    for kernel in ("plain", "fused"):
        loss = cross_entropy(output, head, labels, kernel=kernel)
        results.append([loss.sum, *torch.autograd.grad(0.7 * loss.sum, [hidden, head.weight])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_know_takes_the_plain_path() -> None:
    drawn = draw(4, 30, 30)
    assert_same(drawn, rtol=0, atol=0, divergence=Divergence("logit_mse"))
    assert_same(drawn, rtol=0, atol=0, divergence=Divergence(z_normed=True))
    assert_same(drawn, rtol=0, atol=0, measure_gradients=True)


def test_a_second_backward_pass_is_refused() -> None:
    rows, head, teacher, targets = draw(4, 30, 30)
    joint = token_losses(rows, head, teacher, targets, kernel="fused").joint
    joint.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has one backward pass"):
        joint.backward()


def test_a_product_is_added_in_the_sums_own_dtype() -> None:
    left, right = torch.randn(9, 4, device=DEVICE).bfloat16(), torch.randn(4, 6, device=DEVICE).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        total = torch.full((9, 6), torch.nan, device=DEVICE, dtype=dtype)
        add_product(total, left, right, is_first=True)
        add_product(total, left, right, is_first=False)
        torch.testing.assert_close(total.float(), 2 * left.float() @ right.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_scaled_where_they_lie_as_torch_scales_them(dtype: torch.dtype) -> None:
    factor = torch.tensor(0.3, device=DEVICE)
    for values in (torch.randn(3, 2000, device=DEVICE, dtype=dtype), torch.randn(7, 5, device=DEVICE, dtype=dtype).T):
        expected = values.clone().mul_(factor)
        assert scale_in_place(values, factor).data_ptr() == values.data_ptr()
        torch.testing.assert_close(values, expected)
    assert scale_in_place(torch.zeros(0, 4, device=DEVICE, dtype=dtype), factor).shape == (0, 4)


def test_chunks_stay_within_the_memory_given_to_logits(monkeypatch) -> None:
    """The published shape: 152k tokens, bfloat16, two models."""
    for num_rows in (2048, 4096, 100_000):
        sides = [(torch.empty(num_rows, 1), Head(torch.empty(151_936, 1, dtype=torch.bfloat16)))] * 2
        size = fused._chunk_rows(sides)
        assert size % 128 == 0
        assert 0.6 * fused.LOGITS_BYTES < size * 2 * 2 * 151_936 <= fused.LOGITS_BYTES
        assert size * -(-num_rows // size) < num_rows + 128 * -(-num_rows // size)  # chunks of one size
    monkeypatch.setattr(fused, "LOGITS_BYTES", 0)
    assert fused._chunk_rows(sides) == 128


def test_a_head_that_autocast_copies_leaves_less_to_the_logits() -> None:
    sides = [(torch.empty(4096, 2048), Head(torch.empty(151_936, 2048, device="meta")))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        size = fused._chunk_rows(sides)
    assert 512 <= size < 2048
    assert size * 2 * 151_936 + 2 * 151_936 * 2048 <= fused.LOGITS_BYTES


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moevlm.ops.kernels import vocabulary

FIXED = {"KIND": 2, "HAS_TEACHER": True, "HAS_TARGETS": True, "SHORTER": True, "BLOCK": 1024}
KERNELS = [vocabulary.statistics_kernel, vocabulary.gradient_kernel, vocabulary.scale_kernel]
KERNELS = [(kernel, FIXED) for kernel in (*KERNELS, vocabulary.divergence_kernel)]
KERNELS.append((vocabulary.divergence_kernel, {**FIXED, "IS_SUMMED": False}))
for kernel, fixed in KERNELS:
    signature = {}
    for name in kernel.arg_names:
        is_size = name.startswith("num_") or name.endswith("stride")
        signature[name] = "constexpr" if name.isupper() else "i32" if is_size else "fp32"
        if name.endswith("_pointer"):
            halves = ("student_pointer", "values_pointer")
            signature[name] = "*i64" if name == "targets_pointer" else "*bf16" if name in halves else "*fp32"
    fixed = {(place,): fixed.get(name, True) for place, name in enumerate(kernel.arg_names) if name.isupper()}
    assert "ptx" in compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32)).asm
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """The interpreter forgives what the compiler does not, such as an annotation of an argument."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_kernels_are_chosen_by_name_and_device() -> None:
    rows = torch.zeros(1, 4)
    assert not is_fused("auto", rows)
    assert not is_fused("plain", rows.to(DEVICE))
    with pytest.raises(
        ValueError, match=r"loss_kernel must be one of .*'fused', .*got 'triton'; set stage.loss_kernel"
    ):
        is_fused("triton", rows)
