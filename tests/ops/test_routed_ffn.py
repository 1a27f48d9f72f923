"""The backward written by hand, on the plain steps, against autograd over a loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from moevlm.ops.fused_choosing import fused_top_k_routing
from moevlm.ops.fused_router import router_logits
from moevlm.ops.routed_ffn import SwiGLUExperts, routed_swiglu
from moevlm.ops.routing import top_k_routing

T, E, K, D, F = 100, 5, 2, 12, 7  # more tokens than the path for a few of them takes
NAMES = ("hidden", "weights", "gate", "up", "down")


class Choices(NamedTuple):
    expert_ids: Tensor
    weights: Tensor
    dropped: Tensor | None = None


def fused(
    hidden: Tensor, choices: Choices, experts: SwiGLUExperts, grouped: bool = False, row_step: int | None = None
) -> Tensor:
    ids, weights, dropped = choices
    return routed_swiglu(hidden, ids, weights, experts, dropped_TK=dropped, grouped=grouped, row_step=row_step)


def loop(hidden: Tensor, choices: Choices, experts: SwiGLUExperts) -> Tensor:
    rows = []
    for t in range(len(hidden)):
        total = torch.zeros_like(hidden[0])
        for k, e in enumerate(choices.expert_ids[t].tolist()):
            if choices.dropped is None or not choices.dropped[t, k]:
                inner = silu(linear(hidden[t], experts.gate[e])) * linear(hidden[t], experts.up[e])
                total = total + choices.weights[t, k] * linear(inner, experts.down[e])
        rows.append(total)
    return torch.stack(rows) if rows else hidden * 0


def check_close(found: Tensor, expected: Tensor, name: str = "") -> None:
    """As near as float32 gets, in which the passes beside the products run."""
    assert (found - expected).norm() <= 2e-6 * expected.norm(), name


def draw(
    *, tokens: int = T, top_k: int = K, drops: bool = False, inner: int = F, dtype: torch.dtype = torch.float64
) -> tuple:
    torch.manual_seed(tokens + top_k)
    ids = (
        torch.stack([torch.randperm(E - 1)[:top_k] for _ in range(tokens)]) if tokens else torch.zeros(0, top_k).long()
    )
    dropped = torch.rand(tokens, top_k) < 0.3 if drops else None
    sizes = {"hidden": (tokens, D), "weights": (tokens, top_k)}
    sizes |= {"gate": (E, inner, D), "up": (E, inner, D), "down": (E, D, inner)}
    return {name: torch.randn(size, dtype=dtype) for name, size in sizes.items()}, ids, dropped


def run(compute, leaves: dict[str, Tensor], ids: Tensor, dropped: Tensor | None, frozen=()) -> dict[str, Tensor]:
    own = {name: leaf.detach().clone().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
    choices = Choices(ids, own["weights"], dropped)
    output = compute(own["hidden"], choices, SwiGLUExperts(own["gate"], own["up"], own["down"]))
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    return {"output": output.detach(), **{name: own[name].grad for name in NAMES}}


@pytest.mark.parametrize("top_k", [1, 3])
def test_grouped_products_give_the_same(top_k: int) -> None:
    leaves, ids, _ = draw(top_k=top_k, inner=8, dtype=torch.float32)
    by_groups = run(partial(fused, grouped=True), leaves, ids, None)
    for name, value in run(partial(fused, grouped=False), leaves, ids, None).items():
        torch.testing.assert_close(by_groups[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("frozen", [("hidden",), ("gate", "up", "down"), ("up",), ("down",)])
def test_grouped_products_of_what_is_frozen_are_left_out(frozen: tuple[str, ...]) -> None:
    leaves, ids, _ = draw(inner=8, dtype=torch.float32)
    found = run(partial(fused, grouped=True), leaves, ids, None, frozen=frozen)
    assert {name for name in NAMES if found[name] is None} == set(frozen)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, T])
def test_values_and_gradients_equal_those_of_the_loop(tokens: int, top_k: int, drops: bool) -> None:
    problem = draw(tokens=tokens, top_k=top_k, drops=drops)
    found, expected = run(fused, *problem), run(loop, *problem)
    for name, value in expected.items():
        value = torch.zeros_like(found[name]) if value is None else value  # every choice of the loop was dropped
        check_close(found[name], value, name)
    assert not found["gate"][E - 1].any(), "an expert without a token has a gradient of zero"


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("row_step", [8, 64, 4 * T])
def test_rows_that_round_a_product_up_add_nothing(nan_in_new_memory: None, row_step: int, drops: bool) -> None:
    problem = draw(drops=drops)
    found, expected = run(partial(fused, row_step=row_step), *problem), run(loop, *problem)
    for name, value in expected.items():
        check_close(found[name], value, name)
    frozen = run(partial(fused, row_step=row_step), *problem, frozen=("hidden", "gate"))
    check_close(frozen["down"], expected["down"])


def test_every_product_on_rows_takes_a_multiple_of_them() -> None:
    leaves, ids, _ = draw()
    with FlopCounterMode(display=False) as exact:
        run(partial(fused, row_step=1), leaves, ids, None)
    with FlopCounterMode(display=False) as rounded:
        run(partial(fused, row_step=64), leaves, ids, None)
    counts = ids.flatten().bincount().tolist()
    whole = [-(-count // 64) * 64 for count in counts]
    assert rounded.get_total_flops() / exact.get_total_flops() == pytest.approx(sum(whole) / sum(counts))


def test_no_token_at_all_leaves_zero_gradients() -> None:
    found = run(fused, *draw(tokens=0))
    assert found["output"].shape == (0, D)
    assert not any(found[name].any() for name in NAMES)


@pytest.mark.parametrize("frozen", [("hidden",), ("weights",), ("gate", "up", "down"), ("up",), ("down", "hidden")])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: tuple[str, ...]) -> None:
    problem = draw()
    found, expected = run(fused, *problem, frozen=frozen), run(fused, *problem)
    for name in NAMES:
        assert (found[name] is None) == (name in frozen)
        if name not in frozen:
            torch.testing.assert_close(found[name], expected[name])


def test_bfloat16_stays_as_near_to_float64_as_the_plain_operations() -> None:
    leaves, ids, dropped = draw()
    rounded = {name: leaf.bfloat16() if name != "weights" else leaf.float() for name, leaf in leaves.items()}
    exact = run(loop, {name: leaf.double() for name, leaf in rounded.items()}, ids, dropped)
    found = run(fused, rounded, ids, dropped)
    plain = run(loop, {**rounded, "weights": rounded["weights"].bfloat16()}, ids, dropped)
    for name, value in exact.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error <= 1.2 * (plain[name].double() - value).norm() / value.norm() + 1e-3, name


def test_a_few_tokens_without_gradient_come_out_the_same() -> None:
    leaves, ids, dropped = draw(tokens=9, drops=True)
    arguments = (leaves["hidden"], Choices(ids, leaves["weights"], dropped))
    experts = SwiGLUExperts(leaves["gate"], leaves["up"], leaves["down"])
    with torch.no_grad():
        check_close(fused(*arguments, experts), loop(*arguments, experts))


def test_many_tokens_without_gradient_come_out_the_same() -> None:
    leaves, ids, dropped = draw(drops=True)
    arguments = (leaves["hidden"], Choices(ids, leaves["weights"], dropped))
    experts = SwiGLUExperts(leaves["gate"], leaves["up"], leaves["down"])
    with torch.no_grad():
        check_close(fused(*arguments, experts), loop(*arguments, experts))


def test_tokens_that_are_not_contiguous_come_out_the_same() -> None:
    leaves, ids, _ = draw()
    wide = leaves["hidden"].repeat_interleave(2, dim=1).requires_grad_()
    experts = SwiGLUExperts(leaves["gate"], leaves["up"], leaves["down"].mT.contiguous().mT)
    output = fused(wide[:, ::2], Choices(ids, leaves["weights"]), experts)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(D, T).T)
    expected = run(fused, {**leaves}, ids, None)
    torch.testing.assert_close(output, expected["output"])
    assert not wide.grad[:, 1::2].any()


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    problem = draw()
    found = run(lambda *given: checkpoint(fused, *given, use_reentrant=False), *problem)
    for name, value in run(fused, *problem).items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_the_graph_may_be_kept_and_gone_through_twice() -> None:
    leaves, ids, _ = draw()
    own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    output = fused(own["hidden"], Choices(ids, own["weights"]), SwiGLUExperts(own["gate"], own["up"], own["down"]))
    first = torch.autograd.grad(output.sum(), list(own.values()), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(output.sum(), list(own.values()))):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("uses", [("logits",), ("tokens",), ("logits", "tokens")])
def test_gradients_of_the_router_are_those_of_a_linear_map(uses: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, D), torch.randn(E, D)
    results = []
    for fused in (True, False):
        own, router = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits, tokens = router_logits(own, router) if fused else (linear(own, router), own)
        total = own.sum() * 0 + router.sum() * 0
        total = total + (logits.square().sum() if "logits" in uses else 0)
        total = total + (tokens.pow(3).sum() if "tokens" in uses else 0)
        total.backward()
        results.append((logits.detach(), own.grad, router.grad))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("uses", [("logits",), ("tokens",), ("logits", "tokens")])
def test_tokens_rounded_beside_the_logits_are_those_of_a_cast(uses: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, D), torch.randn(E, D)
    results = []
    for at_once in (True, False):
        own, router = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits, tokens = router_logits(own, router, dtype=torch.bfloat16 if at_once else None)
        tokens = tokens.bfloat16()
        total = own.sum() * 0 + router.sum() * 0
        total = total + (logits.square().sum() if "logits" in uses else 0)
        total = total + (tokens.pow(3).sum() if "tokens" in uses else 0)
        total.backward()
        results.append((logits.detach(), tokens.detach(), own.grad, router.grad))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3, E])
@pytest.mark.parametrize("uses", [("probs",), ("weights",), ("probs", "weights")])
def test_the_backward_of_choosing_is_that_of_autograd(
    uses: tuple[str, ...], top_k: int, score: str, normalise: bool
) -> None:
    torch.manual_seed(top_k)
    logits, bias = torch.randn(40, E), torch.rand(E)
    results = []
    for choose in (fused_top_k_routing, top_k_routing):
        own = logits.clone().requires_grad_()
        routing = choose(own, top_k=top_k, score=score, normalise=normalise, selection_bias_E=bias)
        total = own.sum() * 0
        total = total + (routing.router_probs.pow(3).sum() if "probs" in uses else 0)
        total = total + ((routing.expert_weights + 1).pow(3)[:, 0].sum() if "weights" in uses else 0)
        total.backward()
        results.append((routing.expert_ids, routing.router_probs.detach(), routing.expert_weights.detach(), own.grad))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
