"""Suite `moe_layer`: a sparse feed-forward layer, forward and backward, beside its peers and over its floor.

The floor is a dense SwiGLU network on K * T rows: the same products without routing. Router, top-k, permutation and
combination are inside the timing of everybody else. Routing is made by the data: the first E numbers of a token say
which experts its router prefers. The last cases are those of generation: a few tokens, forward only, over the time that
reading the weights of the chosen experts takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from moevlm.benchmarks import moe_peers
from moevlm.benchmarks.harness import Case, Contender, Work
from moevlm.benchmarks.machine import Ceilings
from moevlm.benchmarks.moe_peers import Layer, Weights
from moevlm.ops.routing import top_k_routing


@dataclass(frozen=True)
class Problem:
    """Sizes of one case; `first_share` of the tokens prefer expert 0, None: all experts alike."""

    name: str
    tokens: int
    width: int = 2048
    inner: int = 5504
    num_experts: int = 4
    top_k: int = 2
    first_share: float | None = None


SMALL = {"width": 896, "inner": 4864}  # Qwen2.5-0.5B's
PROBLEMS = {
    "full": (
        Problem("8k balanced", 8192),
        Problem("8k skewed", 8192, first_share=0.6),
        Problem("32k balanced", 32768),
        Problem("32k skewed", 32768, first_share=0.6),
        Problem("0.5B shape, 16k balanced", 16384, **SMALL),
        Problem("0.5B shape, 16k skewed", 16384, **SMALL, first_share=0.6),
        Problem("16k, top-1 skewed", 16384, top_k=1, first_share=0.6),
        Problem("8k, 64 experts, top-8", 8192, inner=768, num_experts=64, top_k=8),
    ),
    "tiny": (
        Problem("balanced", 33, width=16, inner=24),
        Problem("skewed", 33, width=16, inner=24, first_share=0.6),
        Problem("top-1 skewed", 33, width=16, inner=24, top_k=1, first_share=0.6),
    ),
}


FEW_TOKENS = {
    "full": tuple(Problem(f"decode, {tokens} tokens", tokens) for tokens in (1, 8, 64)),
    "tiny": (Problem("decode, 3 tokens", 3, width=16, inner=24),),
}


def cases(*, size: str, device: torch.device) -> Iterator[Case]:
    """Forward and backward of every problem; bfloat16 on a GPU, float32 elsewhere."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for problem in PROBLEMS[size]:
        weights, hidden_TD, output_gradient_TD = draw(problem, device, dtype)
        run = partial(_work, hidden_TD=hidden_TD, output_gradient_TD=output_gradient_TD)
        capacity = int(_choices(weights, hidden_TD).flatten().bincount().max())
        flop = 18.0 * problem.tokens * problem.top_k * problem.width * problem.inner  # three maps, three products each
        yield Case(
            problem.name,
            [Contender("dense floor", partial(_floor, weights, hidden_TD, flop, problem.top_k))]
            + [Contender(name, partial(run, build, weights, flop=flop)) for name, build in peers(capacity).items()],
            floor="dense floor",
            reference=partial(_reference, weights, hidden_TD, output_gradient_TD),
            tolerance=3e-2 if dtype == torch.bfloat16 else 1e-4,
            facts={key: value for key, value in asdict(problem).items() if value is not None},
        )
    for problem in FEW_TOKENS[size]:
        yield _few_tokens_case(problem, device, dtype)


def peers(capacity: int) -> dict[str, Callable[[Weights], Layer]]:
    """Who is measured, ours first; `capacity` is the least with which nothing is dropped."""
    return {
        "fused (ours)": partial(moe_peers.ours, kernel="fused"),
        "plain (ours)": partial(moe_peers.ours, kernel="plain"),
        "transformers eager": partial(moe_peers.transformers_experts, implementation="eager"),
        "transformers grouped_mm": partial(moe_peers.transformers_experts, implementation="grouped_mm"),
        "scattermoe": moe_peers.scatter_moe,
        "einsum dispatch": partial(moe_peers.einsum_dispatch, capacity=capacity),
        "liger": moe_peers.liger_experts,
    }


def few_token_peers() -> dict[str, tuple[Callable[[Weights], Layer], bool]]:
    """Who decodes, and whether a CUDA graph holds the step."""
    fused = partial(moe_peers.ours, kernel="fused")
    batched = partial(moe_peers.transformers_experts, implementation="batched_mm")
    return {
        "fused (ours)": (fused, False),
        "fused (ours), CUDA graph": (fused, True),
        "plain (ours)": (partial(moe_peers.ours, kernel="plain"), False),
        "transformers eager": (partial(moe_peers.transformers_experts, implementation="eager"), False),
        "transformers batched_mm": (batched, False),
        "transformers batched_mm, CUDA graph": (batched, True),
        "transformers grouped_mm": (partial(moe_peers.transformers_experts, implementation="grouped_mm"), False),
    }


def draw(problem: Problem, device: torch.device, dtype: torch.dtype) -> tuple[Weights, Tensor, Tensor]:
    """Weights, tokens and the gradient of the output; random but for the routing, which has clear margins."""
    generator = torch.Generator(device).manual_seed(0)
    num_experts, width, inner = problem.num_experts, problem.width, problem.inner

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    router_ED = normal(num_experts, width, std=0.02 * width**-0.5)
    router_ED[:, :num_experts] = 2 * torch.eye(num_experts, device=device, dtype=dtype)
    gate_EFD, up_EFD = (normal(num_experts, inner, width, std=width**-0.5) for _ in range(2))
    weights = Weights(router_ED, gate_EFD, up_EFD, normal(num_experts, width, inner, std=inner**-0.5), problem.top_k)
    hidden_TD = normal(problem.tokens, width, std=1.0)
    preferences_TE = torch.rand(problem.tokens, num_experts, generator=generator, device=device)
    if problem.first_share is not None:
        lucky_T = torch.rand(problem.tokens, generator=generator, device=device) < problem.first_share
        preferences_TE[lucky_T, 0] = 2
    ranks_TE = preferences_TE.argsort(descending=True).argsort()  # 0 for the favourite
    hidden_TD[:, :num_experts] = (2.0 - 3.0 * ranks_TE / num_experts).to(hidden_TD)
    return weights, hidden_TD.requires_grad_(), normal(problem.tokens, width, std=1.0)


def _choices(weights: Weights, hidden_TD: Tensor) -> Tensor:
    return top_k_routing(hidden_TD.detach() @ weights.router.T, top_k=weights.top_k).expert_ids


def _work(
    build: Callable[[Weights], Layer], weights: Weights, hidden_TD: Tensor, output_gradient_TD: Tensor, *, flop: float
) -> Work:
    layer = build(weights)
    leaves = [hidden_TD, *layer.parameters.values()]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        output_TD = layer.forward(hidden_TD)
        output_TD.backward(output_gradient_TD)
        return output_TD

    def outputs() -> Mapping[str, Tensor]:
        found = {"output": step().detach(), "hidden": hidden_TD.grad, **layer.gradients()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    return Work(step, outputs, {"flop": flop})


def _floor(weights: Weights, hidden_TD: Tensor, flop: float, top_k: int) -> Work:
    rows_MD = hidden_TD.detach().repeat(top_k, 1).requires_grad_()
    work = _work(moe_peers.dense, weights, rows_MD, torch.ones_like(rows_MD), flop=flop)
    return Work(work.step, None, work.units)


def _reference(weights: Weights, hidden_TD: Tensor, output_gradient_TD: Tensor) -> Mapping[str, Tensor]:
    """Our plain operations in float32. The weight of a peer's only choice is the constant 1: no gradient to compare."""
    rows_TD = hidden_TD.detach().float().requires_grad_()
    work = _work(
        partial(moe_peers.ours, kernel="plain"),
        weights.to(torch.float32),
        rows_TD,
        output_gradient_TD.float(),
        flop=0.0,
    )
    assert work.outputs is not None
    found = work.outputs()
    return {name: found[name] for name in found if weights.top_k > 1 or name not in ("hidden", "router")}


def _few_tokens_case(problem: Problem, device: torch.device, dtype: torch.dtype) -> Case:
    weights, hidden_TD, _ = draw(problem, device, dtype)
    chosen = _choices(weights, hidden_TD).unique().numel()
    num_bytes = 3.0 * chosen * problem.inner * problem.width * weights.gate.itemsize

    def floor(ceilings: Ceilings) -> float:
        return num_bytes / ceilings.bytes_per_second

    run = partial(_forward_work, weights=weights, hidden_TD=hidden_TD.detach(), num_bytes=num_bytes)

    @torch.no_grad()
    def reference() -> Mapping[str, Tensor]:
        layer = moe_peers.ours(weights.to(torch.float32), kernel="plain")
        return {"output": layer.forward(hidden_TD.float())}

    return Case(
        problem.name,
        [
            Contender(name, partial(run, build, in_graph=in_graph))
            for name, (build, in_graph) in few_token_peers().items()
        ],
        floor=floor,
        reference=reference,
        tolerance=3e-2 if dtype == torch.bfloat16 else 1e-4,
        facts={"tokens": problem.tokens, "width": problem.width, "inner": problem.inner, "chosen_experts": chosen},
    )


def _forward_work(
    build: Callable[[Weights], Layer], *, weights: Weights, hidden_TD: Tensor, num_bytes: float, in_graph: bool
) -> Work:
    layer = build(weights)

    @torch.no_grad()
    def step() -> Tensor:
        return layer.forward(hidden_TD)

    if not in_graph:
        return Work(step, lambda: {"output": step()}, {"byte": num_bytes})
    if hidden_TD.device.type != "cuda":
        raise RuntimeError("a CUDA graph needs a GPU")
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output_TD = step()

    def replay() -> Tensor:
        graph.replay()
        return output_TD

    return Work(replay, lambda: {"output": replay().clone()}, {"byte": num_bytes})
