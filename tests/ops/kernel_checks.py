"""Each kernel against its plain twin: run as a program under TRITON_INTERPRET=1, or from test_kernels.py on a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.testing import assert_close

from moevlm.ops import plain_steps
from moevlm.ops.fused_router import router_logits
from moevlm.ops.routed_ffn import ROW_STEP, SwiGLUExperts, routed_swiglu
from moevlm.ops.steps import PLAIN, triton_steps

SHAPES = [  # tokens, experts, top_k, width, inner: odd ones, one expert, many, more choices than a block
    (5, 4, 2, 16, 24),
    (37, 3, 1, 33, 45),
    (30, 128, 3, 20, 12),
    (1, 1, 1, 7, 5),
    (700, 5, 2, 8, 9),
    (50, 64, 8, 8, 16),
]
LARGE = [(1000, 4, 2, 896, 1216), (515, 64, 8, 72, 200)]  # for a GPU
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


class Problem:
    """Random numbers of one shape; expert 1 is empty where there are several, every seventh choice may be dropped."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, *, drops: bool = False) -> None:
        torch.manual_seed(sum(shape))
        self.tokens, self.experts, self.top_k, self.width, self.inner = shape
        logits_TE = torch.randn(self.tokens, self.experts, device=device)
        if self.experts > self.top_k:
            logits_TE[:, 1] = -9
        self.ids_TK = logits_TE.topk(self.top_k).indices
        self.dropped_TK = (torch.arange(self.ids_TK.numel(), device=device) % 7 == 3).view_as(self.ids_TK)
        self.dropped_TK = self.dropped_TK if drops else None
        self.weights_TK = torch.rand(self.tokens, self.top_k, device=device)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype) / size[-1] ** 0.5

        self.normal = normal
        self.hidden_TD = normal(self.tokens, self.width) * self.width**0.5
        self.parts = SwiGLUExperts(
            normal(self.experts, self.inner, self.width),
            normal(self.experts, self.inner, self.width),
            normal(self.experts, self.width, self.inner),
        )
        self.router_ED = normal(self.experts, self.width).float()

    @property
    def order(self) -> tuple[Tensor, Tensor, Tensor]:
        row_TK, choice_C, counts_E = plain_steps.sort_choices(self.ids_TK, self.dropped_TK, num_experts=self.experts)
        return row_TK, choice_C[: int(counts_E.sum())], counts_E


def check_sorting(problem: Problem) -> None:
    """Exactly equal, dropped choices included."""
    rows_TK, choices_C, counts_E = triton_steps().sort_choices(
        problem.ids_TK, problem.dropped_TK, num_experts=problem.experts
    )
    expected_TK, expected_M, expected_E = problem.order
    assert rows_TK.tolist() == expected_TK.tolist()
    assert choices_C[: len(expected_M)].tolist() == expected_M.tolist()
    assert all(0 <= choice < problem.ids_TK.numel() for choice in choices_C.tolist())
    assert counts_E.tolist() == expected_E.tolist()


def check_choosing(problem: Problem) -> None:
    """Choices exactly, probabilities, weights and the gradient of the logits; every kind of score."""
    logits_TE = torch.randn(problem.tokens, problem.experts, device=problem.hidden_TD.device)
    logits_TE[::3] = logits_TE[::3].round()  # ties
    bias_E = torch.rand(problem.experts, device=logits_TE.device)
    close = {"rtol": 1e-4, "atol": 1e-6}
    for score, normalise, bias in (("softmax", True, None), ("sigmoid", True, bias_E), ("softmax", False, None)):
        options = {"top_k": problem.top_k, "score": score, "normalise": normalise}
        found = triton_steps().choose(logits_TE, bias, **options)
        probs_TE, ids_TK, weights_TK = PLAIN.choose(logits_TE, bias, **options)
        assert found[1].tolist() == ids_TK.tolist()
        assert_close(found[0], probs_TE, **close)
        assert_close(found[2], weights_TK, **close)
        del options["top_k"]
        for grads in ((None, weights_TK.cos()), (probs_TE.cos(), weights_TK.cos()), (probs_TE.cos(), None)):
            arguments = (logits_TE, ids_TK, weights_TK, *grads)
            found_TE = triton_steps().choose_backward(*arguments, **options)
            assert_close(found_TE, PLAIN.choose_backward(*arguments, **options), **close)


def check_rows(problem: Problem) -> None:
    """Copies are exact, sums are those of float32."""
    rows_TK, choices_M, _ = problem.order
    found_MD, expected_MD = (problem.hidden_TD.new_empty(len(choices_M), problem.width) for _ in range(2))
    triton_steps().gather_rows(problem.hidden_TD, choices_M, found_MD, top_k=problem.top_k)
    plain_steps.gather_rows(problem.hidden_TD, choices_M, expected_MD, top_k=problem.top_k)
    assert_close(found_MD, expected_MD, rtol=0, atol=0)
    expected_TD = plain_steps.sum_rows(expected_MD, rows_TK)
    assert_close(triton_steps().sum_rows(expected_MD, rows_TK), expected_TD, rtol=1e-2, atol=1e-6)


def check_swiglu(problem: Problem) -> None:
    """Forward, backward, the weights' gradient."""
    _, choices_M, _ = problem.order
    gate, up, grad = (problem.normal(len(choices_M), problem.inner) * 3 for _ in range(3))
    results = []
    for steps in (triton_steps(), PLAIN):
        out, again, up_grad = (torch.empty_like(gate) for _ in range(3))
        gate_grad, weights_grad = grad.clone(), torch.zeros_like(problem.weights_TK)
        steps.swiglu(gate, up, problem.weights_TK, choices_M, out)
        steps.swiglu_backward(
            gate,
            up,
            problem.weights_TK,
            choices_M,
            gate_grad,
            out_RF=again,
            up_grad_RF=up_grad,
            weights_grad_TK=weights_grad,
        )
        results.append((out, again, gate_grad, up_grad, weights_grad))
    for found, expected in zip(*results):
        assert_close(found, expected, **TOLERANCE[gate.dtype])


def check_router(problem: Problem) -> None:
    """Float32 accuracy whatever the dtype of the tokens, with and without a gradient that passes."""
    kernels, grad_TE = triton_steps(), torch.randn(problem.tokens, problem.experts, device=problem.hidden_TD.device)
    exact = {"rtol": 1e-5, "atol": 1e-4}
    rounded_TD = torch.empty_like(problem.hidden_TD, dtype=torch.bfloat16)
    found_TE = kernels.router_logits(problem.hidden_TD, problem.router_ED, rounded_TD=rounded_TD)
    assert_close(rounded_TD, problem.hidden_TD.bfloat16(), rtol=1e-2, atol=0)
    assert torch.equal(found_TE, kernels.router_logits(problem.hidden_TD, problem.router_ED))
    assert_close(found_TE.double(), problem.hidden_TD.double() @ problem.router_ED.double().T, **exact)
    for passed_TD in (None, problem.hidden_TD, rounded_TD):
        arguments = (grad_TE, problem.router_ED, passed_TD, problem.hidden_TD.dtype)
        found_TD, expected_TD = kernels.router_hidden_grad(*arguments), PLAIN.router_hidden_grad(*arguments)
        assert_close(found_TD, expected_TD, **TOLERANCE[problem.hidden_TD.dtype])
    found_ED = kernels.router_weight_grad(grad_TE, problem.hidden_TD)
    assert_close(found_ED.double(), grad_TE.double().T @ problem.hidden_TD.double(), rtol=1e-4, atol=1e-3)


def check_grouped(problem: Problem) -> None:
    """One product for all experts, against expert by expert; where the GPU's grouped products take the shape."""
    fits = problem.width % 8 == problem.inner % 8 == 0 and problem.hidden_TD.dtype == torch.bfloat16
    if problem.dropped_TK is not None or not fits:
        return
    results = []
    for grouped in (True, False):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (problem.hidden_TD, *problem.parts)]
        hidden, gate, up, down = leaves
        output_TD = routed_swiglu(
            hidden, problem.ids_TK, problem.weights_TK, SwiGLUExperts(gate, up, down), grouped=grouped
        )
        output_TD.square().sum().backward()
        results.append([output_TD, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results):
        scale = expected.float().abs().max().clamp_min(1e-3)
        assert_close(found.float() / scale, expected.float() / scale, **TOLERANCE[torch.bfloat16])


def check_layer(problem: Problem) -> None:
    """Router and experts together, values and gradients, kernels against plain steps; tokens not contiguous."""
    results = []
    for steps, row_step in ((triton_steps(), ROW_STEP), (PLAIN, 1)):
        wide_TD = problem.hidden_TD.repeat_interleave(2, dim=1)
        leaves = [wide_TD, problem.weights_TK, *problem.parts, problem.router_ED]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        hidden, weights, gate, up, down, router = leaves
        logits_TE, hidden_TD = router_logits(hidden[:, ::2], router, steps=steps)
        experts, ids_TK = SwiGLUExperts(gate, up, down), problem.ids_TK
        options = {"dropped_TK": problem.dropped_TK, "steps": steps, "row_step": row_step}
        output_TD = routed_swiglu(hidden_TD, ids_TK, weights, experts, **options)
        (output_TD.float().square().sum() + logits_TE.square().sum()).backward()
        results.append([output_TD, logits_TE, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results):
        scale = expected.float().abs().max().clamp_min(1e-3)
        assert_close(found.float() / scale, expected.float() / scale, **TOLERANCE[problem.hidden_TD.dtype])


CHECKS: dict[str, Callable[[Problem], None]] = {
    "choosing": check_choosing,
    "sorting": check_sorting,
    "rows": check_rows,
    "swiglu": check_swiglu,
    "router": check_router,
    "layer": check_layer,
    "grouped": check_grouped,
}


def problems(device: str, shapes: list[tuple[int, ...]]) -> Iterator[tuple[str, Problem]]:
    """Every shape in both dtypes, dropped choices in every second one."""
    for number, shape in enumerate(shapes):
        for dtype in (torch.float32, torch.bfloat16):
            drops = number % 2 == 1
            yield f"{shape} {dtype} drops={drops}", Problem(shape, dtype, device, drops=drops)


if __name__ == "__main__":
    place = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    torch.set_num_threads(1)
    failures = 0
    for name, problem in problems(place, [(SHAPES + LARGE)[int(number)] for number in sys.argv[1:]]):
        for title, check in CHECKS.items():
            try:
                check(problem)
                print(f"ok {title} {name}", flush=True)
            except Exception as error:
                failures += 1
                print(f"FAILED {title} {name}: {type(error).__name__}: {error}", flush=True)
    sys.exit(failures > 0)
