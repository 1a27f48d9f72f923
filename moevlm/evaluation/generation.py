"""Batched decoding with a key-value cache, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from moevlm.batch import DEFAULT_VIEW, IMAGE_TOKEN_ID, EncodedSample
from moevlm.evaluation.decoding import Session
from moevlm.models.decoder import context_length
from moevlm.models.vlm import VLM


@torch.no_grad()
def generate(
    vlm: VLM,
    prompts: Sequence[EncodedSample],
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    batch_size: int,
    view: str = DEFAULT_VIEW,
    on_batch: Callable[[int], object] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    keep_going: Callable[[bool], bool] = bool,
    decoding: str = "auto",
) -> list[list[int]]:
    """Continue every prompt with its most likely token, or a drawn one, until an end token.

    Prompts run in batches of similar length, longest first (memory runs out at once or never), padded on the left;
    neither padding nor finished answers reach a router. In float32 the answers do not depend on `batch_size` or on the
    order of the prompts; in bf16 two logits may round to a tie, and the lower token id wins.

    Args:
        vlm: in eval mode; its device is used.
        prompts: encoded without an answer (`Processor.encode_prompt`); images are encoded once per batch.
        max_new_tokens: longest answer.
        eos_token_ids: ids that end an answer; not part of it.
        batch_size: prompts that run together.
        view: which of the prompts' image transforms the model sees.
        on_batch: called with the number of answers after each batch; a progress bar's `update`, for one.
        temperature: 0 takes the most likely token; otherwise tokens are drawn from ``softmax(logits / temperature)``.
        generator: of the draws, on the model's device; they depend on how prompts share batches.
        keep_going: asked after each token with whether an answer still runs; ranks that share a sharded model must
            answer alike, as each of them takes part in every token.
        decoding: how a step runs, see `Session`: auto, fused, graph, eager or dynamic.

    Returns:
        Token ids of each answer, in the order of the prompts.

    Raises:
        ValueError: the model is in training mode, temperature is negative, a number is less than 1, prompt and
            answer exceed the context, or `decoding` is unknown or does not fit the model.
    """
    if vlm.training:
        raise ValueError("generation needs the model in eval mode; call vlm.eval() first")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}; set temperature")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}; "
            "set evaluate.batch_size or the benchmark's max_new_tokens"
        )
    lengths = [_spliced_length(vlm, prompt, view) for prompt in prompts]
    _check_context(vlm, prompts, lengths, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: (-lengths[index], index))
    answers: list[list[int]] = [[] for _ in prompts]
    size = {"batch_size": min(batch_size, len(prompts)), "max_length": max(lengths, default=0) + max_new_tokens}
    session = Session(vlm, decoding, view=view, **size)
    ends = torch.tensor(sorted(eos_token_ids), dtype=torch.int64, device=session.device)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        samples = [prompts[index] for index in chosen]
        found = generate_batch(
            session, samples, max_new_tokens, ends, temperature=temperature, generator=generator, keep_going=keep_going
        )
        for index, answer in zip(chosen, found):
            answers[index] = answer
        if on_batch is not None:
            on_batch(len(chosen))
    return answers


@torch.no_grad()
def generate_batch(
    session: Session,
    prompts: Sequence[EncodedSample],
    max_new_tokens: int,
    ends: Tensor,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    keep_going: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """One batch of `generate` in an open session, at most of its size; `ends` are the ids that end an answer."""
    logits_BV = session.start(prompts)
    running_B = torch.ones(len(prompts), dtype=torch.bool, device=logits_BV.device)
    looks_back = temperature == 0 and keep_going is bool and logits_BV.is_cuda
    asked = _LateAnswer() if looks_back else None
    steps: list[Tensor] = []  # [B] each; -1 once an answer has ended
    for step in range(max_new_tokens):
        token_B = _choose(logits_BV, temperature, generator)
        running_B = running_B & ~torch.isin(token_B, ends)
        steps.append(token_B.masked_fill(~running_B, -1))
        is_running = running_B.any()
        if step + 1 == max_new_tokens or not keep_going(bool(is_running) if asked is None else asked(is_running)):
            break
        logits_BV = session.advance(token_B, running_B)
    return [[token for token in row if token >= 0] for row in torch.stack(steps, dim=1).tolist()]


class _LateAnswer:
    """A flag of the device as it was one call ago, so that the host queues a step while the last one still runs.

    The price is one step too many at the end of a batch, whose tokens count as ended.
    """

    def __init__(self) -> None:
        self.flags = torch.ones(2, dtype=torch.bool).pin_memory()
        self.events = [torch.cuda.Event(), torch.cuda.Event()]
        self.num_calls = 0

    def __call__(self, flag: Tensor) -> bool:
        now, before = self.num_calls % 2, (self.num_calls + 1) % 2
        self.flags[now].copy_(flag, non_blocking=True)
        self.events[now].record()
        self.num_calls += 1
        if self.num_calls == 1:
            return True
        self.events[before].synchronize()
        return bool(self.flags[before])


def _choose(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    return torch.multinomial(torch.softmax(logits_BV / temperature, dim=-1), 1, generator=generator).squeeze(1)


def _spliced_length(vlm: VLM, prompt: EncodedSample, view: str) -> int:
    num_images = int((prompt.input_ids == IMAGE_TOKEN_ID).sum())
    return len(prompt.input_ids) - num_images + sum(vlm.visual_token_counts(prompt, num_images, view))


def _check_context(vlm: VLM, prompts: Sequence[EncodedSample], lengths: Sequence[int], max_new_tokens: int) -> None:
    limit = context_length(vlm.language_model.config)
    for prompt, length in zip(prompts, lengths):
        if limit is not None and length + max_new_tokens > limit:
            raise ValueError(
                f"prompt {prompt.key!r} has {length} tokens with its images, and {max_new_tokens} new ones exceed the "
                f"language model's context of {limit}; lower max_new_tokens or shorten the prompt"
            )
