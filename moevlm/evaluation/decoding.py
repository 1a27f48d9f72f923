"""The ways to decode: how a prompt becomes a filled cache, and a token the logits of the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moevlm.batch import EncodedSample
from moevlm.models.fused_decode import FusedStep, why_not_fused
from moevlm.models.key_value_cache import FixedCache
from moevlm.models.vlm import VLM
from moevlm.ops.decode import has_kernels
from moevlm.preprocessing.collate import pack

DECODINGS = ("auto", "fused", "graph", "eager", "dynamic")
NUM_EAGER_STEPS = 3
"""Steps of the first batch before one is captured, which costs as much as many steps: answers may be short."""
FUSED_DTYPE = torch.bfloat16
"""Weights whose fused steps were timed (docs/performance.md); "auto" takes these steps for no others."""
CAPTURED_FAMILIES = (
    "gemma2", "glm4", "gpt_neox", "granite", "llama", "minicpm3",
    "mistral", "phi", "phi3", "qwen2", "qwen3", "stablelm",
)  # fmt: skip
"""Decoders whose captured answers are compared with plain ones by a test on a GPU; "auto" captures no others."""

Step = Callable[[Tensor, Tensor], Tensor]


class Session:
    """Decodes one batch after another; keeps the cache, and the step it captured, between them."""

    def __init__(self, vlm: VLM, decoding: str, *, batch_size: int, max_length: int, view: str) -> None:
        """Choose how to decode.

        Args:
            decoding: "dynamic" lets the cache grow, "eager" fixes its size. "graph" also captures the step in a CUDA
                graph, "fused" captures one of few kernels (`FusedStep`); on a CPU both run uncaptured. "auto" takes
                the first of fused, graph and eager that is known to fit (`automatic_decoding`).
            batch_size: most prompts in a batch.
            max_length: most columns that a prompt and its answer take.
            view: which of the prompts' image transforms the model sees.

        Raises:
            ValueError: an unknown way, or one that this model cannot be decoded in.
        """
        self.vlm, self.view = vlm, view
        self.size = (batch_size, max_length)
        self.device = next(vlm.parameters()).device
        self.decoding = choose_decoding(vlm, decoding, batch_size)
        self.cache: Any = None
        self.pinned: PinnedStep | None = None

    def start(self, prompts: Sequence[EncodedSample]) -> Tensor:
        """[B, V] logits of the first new tokens; the whole prompts pass the model once, padded on the left."""
        vlm = self.vlm
        inputs = vlm.embed(pack(prompts).to(self.device), self.view)
        lengths_B = torch.tensor(inputs.splice.lengths, device=self.device)
        self.longest, self.num_steps = max(inputs.splice.lengths), 0
        is_padded = min(inputs.splice.lengths) < self.longest
        self.starts_B = self.longest - lengths_B
        position_ids_BS = torch.arange(self.longest, device=self.device) - self.starts_B[:, None]
        self.real_BS = position_ids_BS >= 0
        embeds_BSD = inputs.inputs_embeds.new_zeros(*self.real_BS.shape, inputs.inputs_embeds.shape[-1])
        embeds_BSD[self.real_BS] = inputs.inputs_embeds  # both in the order of sequences, then of tokens
        if isinstance(self.cache, FixedCache):
            self.cache.restart()
        else:
            self.cache = vlm.new_cache(inputs, None if self.decoding == "dynamic" else self.size)
        hidden_BD = vlm.decode(
            embeds_BSD,
            attention_mask=_prefill_mask(self.real_BS) if is_padded else None,
            position_ids=position_ids_BS.clamp(min=0),
            past_key_values=self.cache,
            token_mask=self.real_BS if is_padded else None,
        )[:, -1]
        return vlm.head.logits(hidden_BD)

    def advance(self, token_B: Tensor, running_B: Tensor) -> Tensor:
        """[B, V] logits behind one more token of each row; valid until the next call. Rows not running are padding."""
        column, self.num_steps = self.longest + self.num_steps, self.num_steps + 1
        if self.decoding in ("fused", "graph") and (self.pinned is not None or self.num_steps > NUM_EAGER_STEPS):
            if self.pinned is None:
                self.pinned = PinnedStep(self.vlm, self.cache, fused=self.decoding == "fused")
            return self.pinned(token_B, running_B, self.starts_B, column)
        self.real_BS = torch.cat([self.real_BS, torch.ones_like(running_B)[:, None]], dim=1)
        hidden_BD = self.vlm.decode(
            self.vlm.embed_tokens(token_B)[:, None],
            attention_mask=self.real_BS[:, None, None],
            position_ids=(column - self.starts_B)[:, None],
            past_key_values=self.cache,
            token_mask=running_B[:, None],
        )[:, -1]
        return self.vlm.head.logits(hidden_BD)


class PinnedStep:
    """A step whose inputs lie in fixed memory; on CUDA it is captured once and replayed."""

    def __init__(self, vlm: VLM, cache: FixedCache, *, fused: bool) -> None:
        self.cache = cache
        device = next(vlm.parameters()).device
        self.token_B = torch.zeros(cache.num_rows, dtype=torch.int64, device=device)
        self.starts_B = torch.zeros_like(self.token_B)
        self.running_B = torch.zeros(cache.num_rows, dtype=torch.bool, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        step = FusedStep if fused else LayerwiseStep
        self.step: Step = step(vlm, cache, self.starts_B, self.position)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_BV: Tensor | None = None

    def __call__(self, token_B: Tensor, running_B: Tensor, starts_B: Tensor, column: int) -> Tensor:
        """[b, V] of the b rows given; a batch with fewer rows than the cache leaves the last ones idle."""
        rows = len(token_B)
        self.token_B[:rows], self.starts_B[:rows] = token_B, starts_B
        self.running_B[:rows], self.running_B[rows:] = running_B, False
        self.position.fill_(column)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.cache.pin(self.position)
            self.logits_BV = self._capture() if token_B.is_cuda else self.step(self.token_B, self.running_B)
        assert self.logits_BV is not None
        return self.logits_BV[:rows]

    def _capture(self) -> Tensor:
        """Run once for what is compiled and allocated on first use, capture, replay: a step may run twice unchanged."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step(self.token_B, self.running_B)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            logits_BV = self.step(self.token_B, self.running_B)
        self.graph.replay()
        return logits_BV


class LayerwiseStep:
    """The model's own layers over the whole cache, with a mask for what is filled."""

    def __init__(self, vlm: VLM, cache: FixedCache, starts_B: Tensor, position: Tensor) -> None:
        self.vlm, self.cache, self.starts_B, self.position = vlm, cache, starts_B, position
        self.columns_L = torch.arange(cache.num_columns, device=position.device)

    def __call__(self, token_B: Tensor, running_B: Tensor) -> Tensor:
        """[B, V] logits."""
        seen_BL = (self.columns_L >= self.starts_B[:, None]) & (self.columns_L <= self.position)
        hidden_BD = self.vlm.decode(
            self.vlm.embed_tokens(token_B)[:, None],
            attention_mask=seen_BL[:, None, None],
            position_ids=(self.position - self.starts_B)[:, None],
            past_key_values=self.cache,
            token_mask=running_B[:, None],
            position=self.position,
        )[:, -1]
        return self.vlm.head.logits(hidden_BD)


class Facts(NamedTuple):
    """What "auto" asks of a model and of where it runs."""

    is_cuda: bool
    has_kernels: bool  # Triton, and a GPU with products in bfloat16
    is_autocast: bool  # the copies that it makes do not outlive it, a captured step would
    is_compiled: bool  # layers by torch.compile, which were never captured
    dtype: torch.dtype
    family: str
    why_not_static: str | None
    why_not_fused: str | None


def automatic_decoding(facts: Facts) -> str:
    """The fastest way that was compared with the plain one for such a model: fused, then graph, then eager."""
    if not facts.is_cuda or facts.is_autocast or facts.why_not_static is not None:
        return "eager"
    if facts.has_kernels and facts.dtype == FUSED_DTYPE and facts.why_not_fused is None:
        return "fused"
    return "graph" if facts.family in CAPTURED_FAMILIES and not facts.is_compiled else "eager"


def gather_facts(vlm: VLM, batch_size: int) -> Facts:
    """Of a model where it lies now."""
    device = vlm.head.weight.device
    return Facts(
        is_cuda=device.type == "cuda",
        has_kernels=has_kernels(device) and torch.cuda.get_device_capability(device) >= (8, 0),
        is_autocast=torch.is_autocast_enabled(device.type),
        is_compiled=any(module._compiled_call_impl is not None for module in vlm.modules()),
        dtype=vlm.head.weight.dtype,
        family=vlm.language_model.config.model_type,
        why_not_static=_why_not_static(vlm),
        why_not_fused=why_not_fused(vlm, batch_size),
    )


def choose_decoding(vlm: VLM, decoding: str, batch_size: int) -> str:
    """What "auto" means here; anything else is checked and returned.

    Raises:
        ValueError: see `Session`.
    """
    if decoding not in DECODINGS:
        raise ValueError(f"decoding must be one of {', '.join(DECODINGS)}, got {decoding!r}; set decoding")
    if decoding == "auto":
        return automatic_decoding(gather_facts(vlm, batch_size))
    if decoding in ("eager", "dynamic"):
        return decoding
    static = _why_not_static(vlm)
    reason = static or why_not_fused(vlm, batch_size) if decoding == "fused" else static
    if reason is not None:
        raise ValueError(f"decoding={decoding} does not fit this model: {reason}; set decoding=auto")
    return decoding


def _why_not_static(vlm: VLM) -> str | None:
    """What keeps a step from being captured, in words."""
    if type(vlm) is not VLM:
        return "whole-model experts are chosen by the host"
    if any(isinstance(parameter, DTensor) for parameter in vlm.parameters()):
        return "its weights are sharded"
    if vlm.lora is not None and vlm.lora.quantization is not None:
        return "its weights are quantized"
    if not all(layer.can_be_static for layer in vlm.moe_layers.values()):
        return "a MoE layer drops tokens, routes at random, or has low-rank experts"
    rope = getattr(vlm.language_model.config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):
        return "its rotary frequencies depend on the length so far"
    return None


def _prefill_mask(real_BS: Tensor) -> Tensor:
    """[B, 1, S, S] causal among real tokens; padding sees itself, since a row that sees nothing gives NaN."""
    num_columns = real_BS.shape[1]
    causal_SS = torch.ones(num_columns, num_columns, dtype=torch.bool, device=real_BS.device).tril()
    itself_SS = torch.eye(num_columns, dtype=torch.bool, device=real_BS.device)
    return ((causal_SS & real_BS[:, None]) | itself_SS)[:, None]
