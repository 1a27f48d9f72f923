"""Suite `generation`: prefill and greedy decoding of a sparse decoder, beside transformers' own `generate`.

The floor of decoding is memory: every step reads the weights that its tokens meet once (of E experts, of which each of
B tokens takes K, about ``E (1 - (1 - K/E)^B)``) and the keys and values so far. The floor of prefill is its matrix
products. Batches are decoded to the end as in an evaluation; what is captured once for many is captured before. Steps
alone leave the prefill out, which a short answer does not pay off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moevlm.batch import IGNORE_INDEX, EncodedSample, Segment
from moevlm.benchmarks.harness import Case, Contender, Work
from moevlm.benchmarks.machine import Ceilings
from moevlm.evaluation.decoding import Session
from moevlm.evaluation.generation import generate_batch
from moevlm.models.build import build_vlm
from moevlm.models.moe.moe_layer import SparseMoE
from moevlm.models.vlm import VLM

NUM_COMPARED = 5  # forced tokens whose logits are compared


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder; MoE in every second layer."""

    width: int = 2048
    inner: int = 5504
    layers: int = 24
    heads: int = 16
    vocabulary: int = 151_936
    num_experts: int = 4
    top_k: int = 2

    def config(self) -> dict[str, Any]:
        """Of Qwen1.5-1.8B's kind of decoder."""
        sizes = {"hidden_size": self.width, "intermediate_size": self.inner, "num_hidden_layers": self.layers}
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.heads}
        rest = {"vocab_size": self.vocabulary, "max_position_embeddings": 4096, "tie_word_embeddings": False}
        return {"model_type": "qwen2", **sizes, **heads, **rest}


@dataclass(frozen=True)
class Problem:
    """How many prompts of which length, and how many new tokens; 0 is prefill alone."""

    name: str
    batch: int
    prompt: int
    new_tokens: int
    steps_alone: bool = False  # behind a prefill that is not timed


SHAPES = {"full": Shape(), "tiny": Shape(width=64, inner=96, layers=2, heads=4, vocabulary=160)}
PROBLEMS = {
    "full": (
        Problem("decode, batch 1", 1, 64, 64),
        Problem("steps alone, batch 1", 1, 64, 64, steps_alone=True),
        Problem("decode, batch 8", 8, 64, 64),
        Problem("decode, batch 32", 32, 64, 64),
        Problem("decode, batch 1 behind 1,024 tokens", 1, 1024, 64),
        Problem("prefill, batch 1", 1, 1024, 0),
        Problem("prefill, batch 8", 8, 1024, 0),
    ),
    "tiny": (
        Problem("decode, batch 3", 3, 7, 5),
        Problem("steps alone, batch 1", 1, 7, 5, steps_alone=True),
        Problem("prefill, batch 2", 2, 11, 0),
    ),
}


def cases(*, size: str, device: torch.device) -> Iterator[Case]:
    """Every problem with one set of weights; bfloat16 on a GPU, float32 elsewhere."""
    shape = SHAPES[size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vlm = random_vlm(shape, device, dtype)
    for problem in PROBLEMS[size]:
        prompts = draw_prompts(problem, shape)
        contenders = [Contender(f"ours, {way}", partial(ours, vlm, prompts, problem, way)) for way in ways(problem)]
        if not problem.steps_alone:
            peer = partial(_transformers_moe, shape, prompts, problem, device, dtype)
            contenders.append(Contender("transformers generate", partial(_transformers, vlm, prompts, problem)))
            contenders.append(Contender("transformers qwen3_moe", peer))
        yield Case(
            problem.name,
            contenders,
            floor=partial(_floor, vlm, shape, problem),
            reference=partial(_forced_logits, vlm, prompts, "dynamic"),
            tolerance=5e-2 if dtype == torch.bfloat16 else 1e-4,
            facts={**asdict(problem), "step_gb": step_bytes(vlm, shape, problem) / 1e9},
        )


def ways(problem: Problem) -> tuple[str, ...]:
    """Of ours, what is timed."""
    if not problem.new_tokens:
        return ("eager", "dynamic")
    return ("fused", "graph") if problem.steps_alone else ("fused", "graph", "eager", "dynamic")


def random_vlm(shape: Shape, device: torch.device, dtype: torch.dtype) -> VLM:
    """Made on the device, as drawing billions of numbers on a CPU takes minutes.

    Weights are small beside the residual stream and the experts of a layer are alike, as after upcycling: rounding is
    not blown up from layer to layer, and two orders of the same sums choose and say nearly the same.
    """
    moe = {"num_experts": shape.num_experts, "top_k": shape.top_k, "placement": "interval"}
    with torch.device("meta"):
        vlm = build_vlm(None, None, shape.config(), moe=moe)
    vlm = vlm.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "experts" in name:
                parameter.copy_(torch.empty_like(parameter[:1]).normal_(generator=generator))
                parameter.add_(torch.empty_like(parameter).normal_(generator=generator), alpha=0.1)
                parameter.mul_(0.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(
                    0.0, 1.0 if "embed" in name else 0.5 * parameter.shape[-1] ** -0.5, generator=generator
                )
            if not name.endswith("router.weight"):
                parameter.data = parameter.data.to(dtype)
    decoder: Any = vlm.language_model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config).to(device)  # its table is no parameter
    return vlm


def draw_prompts(problem: Problem, shape: Shape) -> list[EncodedSample]:
    """Text of random tokens."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for row in range(problem.batch):
        ids = torch.randint(0, shape.vocabulary, (problem.prompt,), generator=generator)
        segments = torch.full_like(ids, int(Segment.QUESTION))
        samples.append(EncodedSample(str(row), ids, torch.full_like(ids, IGNORE_INDEX), segments))
    return samples


def step_bytes(vlm: VLM, shape: Shape, problem: Problem) -> float:
    """What a step of the batch must read, halfway through: weights met, head, keys and values; embeddings are a row."""
    itemsize = vlm.head.weight.element_size()
    weights = float(vlm.head.weight.numel())
    for layer in vlm.decoder_blocks:
        moe = layer.mlp if isinstance(layer.mlp, SparseMoE) else None
        weights += sum(parameter.numel() for parameter in layer.parameters())
        if moe is not None:
            unmet = moe.num_experts * (1 - shape.top_k / moe.num_experts) ** problem.batch
            weights -= unmet * moe.experts.num_own_parameters
    cached = 2 * shape.width * shape.layers * problem.batch * (problem.prompt + problem.new_tokens / 2)
    return itemsize * (weights + cached)


def prefill_flop(vlm: VLM, shape: Shape, problem: Problem) -> float:
    """Of the linear maps over the prompt, of causal attention, and of the head on the last tokens."""
    layers = sum(parameter.numel() for layer in vlm.decoder_blocks for parameter in layer.parameters())
    idle = sum(moe.num_idle_parameters for moe in vlm.moe_layers.values())
    tokens = problem.batch * problem.prompt
    attention = 2.0 * shape.width * shape.layers * tokens * problem.prompt
    return 2.0 * tokens * (layers - idle) + attention + 2.0 * problem.batch * vlm.head.weight.numel()


def _floor(vlm: VLM, shape: Shape, problem: Problem, ceilings: Ceilings) -> float:
    if problem.new_tokens:
        return problem.new_tokens * step_bytes(vlm, shape, problem) / ceilings.bytes_per_second
    return prefill_flop(vlm, shape, problem) / ceilings.flop_per_second


def ours(vlm: VLM, prompts: list[EncodedSample], problem: Problem, way: str) -> Work:
    """One way to decode, in a session that is kept."""
    ends = torch.empty(0, dtype=torch.int64, device=vlm.head.weight.device)
    session = _session(vlm, prompts, way, problem.new_tokens)

    @torch.no_grad()
    def step() -> object:
        if not problem.new_tokens:
            return session.start(prompts)
        return generate_batch(session, prompts, problem.new_tokens, ends)

    work = _steps_alone(session, prompts, problem) if problem.steps_alone else step
    return Work(work, partial(_forced_logits, vlm, prompts, way), _units(problem))


def _steps_alone(session: Session, prompts: list[EncodedSample], problem: Problem) -> Callable[[], object]:
    """The same greedy steps of a captured session again and again, in the columns behind the prompt."""
    running_B = torch.ones(len(prompts), dtype=torch.bool, device=session.device)

    @torch.no_grad()
    def step(first_BV: Tensor) -> object:
        logits_BV, session.num_steps = first_BV, 0
        for _ in range(problem.new_tokens):
            logits_BV = session.advance(logits_BV.argmax(dim=-1), running_B)
        return logits_BV

    with torch.no_grad():
        first_BV = session.start(prompts)
        step(first_BV)  # captures
        return partial(step, session.start(prompts))


def _session(vlm: VLM, prompts: list[EncodedSample], way: str, new_tokens: int) -> Session:
    longest = len(prompts[0].input_ids) + max(new_tokens, NUM_COMPARED + 1)
    return Session(vlm, way, batch_size=len(prompts), max_length=longest, view="default")


@torch.no_grad()
def _forced_logits(vlm: VLM, prompts: list[EncodedSample], way: str) -> Mapping[str, Tensor]:
    """Of the last prompt token and of given tokens behind it; the second batch of a session is captured throughout."""
    session = _session(vlm, prompts, way, NUM_COMPARED + 1)
    running_B = torch.ones(len(prompts), dtype=torch.bool, device=session.device)
    found: list[Tensor] = []
    for _ in range(2):
        found = [session.start(prompts)]
        for step in range(NUM_COMPARED):
            found.append(session.advance(_forced(prompts, step).to(session.device), running_B).clone())
    return {"logits": torch.stack(found, dim=1)}


def _forced(prompts: list[EncodedSample], step: int) -> Tensor:
    return torch.stack([prompt.input_ids[step] for prompt in prompts])


def _transformers(vlm: VLM, prompts: list[EncodedSample], problem: Problem) -> Work:
    """Its own loop, cache and attention over the same weights."""
    model = vlm.language_model
    ids_BS = torch.stack([prompt.input_ids for prompt in prompts]).to(vlm.head.weight.device)

    def outputs() -> Mapping[str, Tensor]:
        forced_BS = torch.stack([_forced(prompts, step) for step in range(NUM_COMPARED)], dim=1).to(ids_BS)
        with torch.no_grad():
            hidden_BSD = model.get_decoder()(torch.cat([ids_BS, forced_BS], dim=1)).last_hidden_state
            return {"logits": vlm.head.logits(hidden_BSD[:, -NUM_COMPARED - 1 :])}

    return Work(_with_sdpa(model, _generate(model, ids_BS, problem)), _with_sdpa(model, outputs), _units(problem))


def _transformers_moe(
    shape: Shape, prompts: list[EncodedSample], problem: Problem, device: torch.device, dtype: torch.dtype
) -> Work:
    """Its own sparse decoder of the same sizes; weights of its own, so there is nothing to compare."""
    settings = {**shape.config(), "model_type": "qwen3_moe", "moe_intermediate_size": shape.inner}
    settings |= {"num_experts": shape.num_experts, "num_experts_per_tok": shape.top_k, "decoder_sparse_step": 2}
    config = AutoConfig.for_model(**settings)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids_BS = torch.stack([prompt.input_ids for prompt in prompts]).to(device)
    return Work(_generate(model, ids_BS, problem), None, _units(problem))


def _generate(model: Any, ids_BS: Tensor, problem: Problem) -> Any:
    number = max(problem.new_tokens, 1)
    options = {"max_new_tokens": number, "min_new_tokens": number, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), **options)


def _with_sdpa(model: Any, work: Any) -> Any:
    """The call with transformers' attention in place of ours, which stays the model's."""

    def run() -> Any:
        ours = model.config._attn_implementation
        model.config._attn_implementation = "sdpa"
        try:
            return work()
        finally:
            model.config._attn_implementation = ours

    return run


def _units(problem: Problem) -> dict[str, float]:
    return {"token": float(problem.batch * (problem.new_tokens or problem.prompt))}
