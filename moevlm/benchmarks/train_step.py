"""Suite `train_step`: whole optimizer steps of a Qwen1.5-1.8B with CLIP-L/336, dense and sparse, over their FLOPs.

A step is one GPU's share of the published recipe (128 samples on 8 GPUs): 16 samples of 600 to 2,600 tokens, an image
of 576 tokens in each, a quarter of the tokens supervised, in two packed micro-batches or, as published and where memory
allows, in one; forward, backward, clipping at 1 and fused AdamW. Parameters, gradients and AdamW's moments are in
float32, products in bfloat16 by autocast, as ``trainer=gpu_bf16`` runs. The floor is the model's FLOPs over the
measured ceiling, so that a ratio is 1 / MFU.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moevlm.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, NO_PAIR, Segment, VLMBatch
from moevlm.benchmarks.harness import Case, Contender, Work
from moevlm.benchmarks.machine import Ceilings
from moevlm.benchmarks.memory import predicted_bytes
from moevlm.losses.language_modeling import cross_entropy
from moevlm.losses.mean import reduce_over_layers
from moevlm.losses.moe import load_balancing_loss
from moevlm.models.build import build_vlm
from moevlm.models.counting import training_flops
from moevlm.models.freezing import freeze_except
from moevlm.models.vlm import VLM

EVERYTHING = ["^connector", "^language_model"]
FEED_FORWARD = [r"^language_model\..*\.mlp\.", "^connector"]  # as conf/stage/moe_tuning.yaml has it
MOE = {"num_experts": 4, "top_k": 2, "placement": "interval", "router_init_std": 0.02}


@dataclass(frozen=True)
class Problem:
    """One model, what of it trains, and in how many pieces a step's samples pass."""

    name: str
    trainable: tuple[str, ...]
    is_sparse: bool = False
    micro_batches: int = 2


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a step."""

    language_model: dict[str, Any]
    vision_encoder: dict[str, Any]
    lengths: tuple[int, int]  # shortest and longest sequence, visual tokens included
    samples: int = 16


SIZES = {
    "full": Sizes(
        {
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 5504,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
        },
        {"name": "vit_large_patch14_clip_quickgelu_336", "feature_layer": -2},
        (600, 2600),
    ),
    "tiny": Sizes(
        {
            "model_type": "qwen2",
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        },
        {
            "name": "vit",
            "image_size": 32,
            "timm_options": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        },
        (24, 60),
        samples=4,
    ),
}
PROBLEMS = (
    Problem("dense, instruction tuning", tuple(EVERYTHING)),
    Problem("4 experts, top 2, MoE tuning", tuple(FEED_FORWARD), is_sparse=True),
    Problem("dense, feed-forward alone", tuple(FEED_FORWARD)),
    Problem("one micro-batch, dense, instruction tuning", tuple(EVERYTHING), micro_batches=1),
    Problem("one micro-batch, dense, feed-forward alone", tuple(FEED_FORWARD), micro_batches=1),
    Problem("one micro-batch, 4 experts, top 2, MoE tuning", tuple(FEED_FORWARD), is_sparse=True, micro_batches=1),
)

Step = Callable[[VLM, list[VLMBatch]], Tensor]
"""Forward and backward passes of a step's micro-batches; gives the loss, a mean over the step's targets."""


def cases(*, size: str, device: torch.device) -> Iterator[Case]:
    """Every problem, ours in several settings, and the padded path of transformers."""
    sizes = SIZES[size]
    for problem in PROBLEMS:
        build = partial(build_model, problem, sizes, device)
        with torch.device("meta"):
            model = freeze_except(_build(problem, sizes), list(problem.trainable))
        visual, pieces = model.num_visual_tokens, problem.micro_batches
        batches = draw_step(sizes, num_visual=visual, micro_batches=pieces, device=device)
        flop = sum(_flop(model, batch) for batch in batches)
        predicted = max(sum(predicted_bytes(model, *_shape(model, batch)).values()) for batch in batches)
        yield Case(
            problem.name,
            [Contender(name, partial(make, build, batches, flop)) for name, make in contenders(problem).items()],
            floor=partial(_seconds_at_ceiling, flop),
            reference=None if size == "full" else partial(_reference, build, batches),
            tolerance=1e-4 if device.type == "cpu" else 3e-2,
            facts={
                **{key: str(value) for key, value in asdict(problem).items()},
                "tokens": sum(model.count_tokens(batch) for batch in batches),
                "targets": sum(batch.num_targets for batch in batches),
                "predicted_peak_gib": predicted / 2**30,
            },
        )
        del model


def contenders(problem: Problem) -> dict[str, Callable[..., Work]]:
    """Ours first; then with one thing off at a time; then who trained LLaVA so far."""
    found: dict[str, Callable[..., Work]] = {"ours": partial(_ours, compile=True)}
    if problem.name.endswith("alone") or problem.micro_batches == 1:
        return found
    found["not compiled"] = partial(_ours)
    if problem.is_sparse:
        found["plain experts"] = partial(_ours, compile=True, moe_kernel="plain")
    else:
        found["selective checkpointing"] = partial(_ours, compile=True, gradient_checkpointing="selective")
        found["full checkpointing"] = partial(_ours, compile=True, gradient_checkpointing=True)
        found["transformers, padded sdpa"] = _transformers
    slow: dict[str, Any] = {"attention": "padded", "loss_kernel": "plain", "gradient_checkpointing": True}
    if problem.is_sparse:
        slow["moe_kernel"] = "plain"
    found["everything off"] = partial(_ours, **slow)
    return found


def draw_step(
    sizes: Sizes, *, num_visual: int, device: torch.device, micro_batches: int = 2, seed: int = 0
) -> list[VLMBatch]:
    """The micro-batches of a step; lengths are skewed to the short as in LLaVA's mixture (a triangular draw)."""
    draw, (shortest, longest) = random.Random(seed), sizes.lengths
    lengths = [
        int(draw.triangular(shortest, longest, shortest + 0.35 * (longest - shortest))) for _ in range(sizes.samples)
    ]
    parts = [lengths[part::micro_batches] for part in range(micro_batches)]
    side = sizes.vision_encoder.get("image_size", 336)
    return [_draw_batch(part, num_visual, side, sizes.language_model["vocab_size"], device) for part in parts]


def build_model(problem: Problem, sizes: Sizes, device: torch.device, **options: Any) -> VLM:
    """Random weights in float32, drawn on the device."""
    with torch.device(device):
        model = _build(problem, sizes, **options)
    return freeze_except(model.to(device), list(problem.trainable)).train()


def loss_of(model: VLM, batch: VLMBatch, *, kernel: str = "auto") -> Tensor:
    """What a stage of instruction or MoE tuning computes of a micro-batch, summed."""
    output = model(batch)
    total = cross_entropy(output, model.head, batch.labels, kernel=kernel).sum
    if output.routings:
        balance = reduce_over_layers(
            lambda _, routing: load_balancing_loss(routing.router_probs, routing.expert_ids), output.routings
        )
        total = total + 0.01 * batch.num_targets * balance.sum / balance.count
    return total


def packed_step(model: VLM, batches: list[VLMBatch], *, kernel: str = "auto") -> Tensor:
    """Packed rows, one micro-batch after another."""
    num_targets, losses = sum(batch.num_targets for batch in batches), []
    for batch in batches:
        with _autocast(batch.input_ids.device):
            loss = loss_of(model, batch, kernel=kernel) / num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def padded_step(model: VLM, batches: list[VLMBatch], *, sequences: int = 4) -> Tensor:
    """transformers' own forward over padded rows with labels, a few sequences at a time, as LLaVA's trainer runs it."""
    num_targets, losses = sum(batch.num_targets for batch in batches), []
    for batch in batches:
        for first in range(0, batch.num_sequences, sequences):
            part = batch.select(range(first, min(first + sequences, batch.num_sequences)))
            with _autocast(batch.input_ids.device):
                inputs, mask, labels = _padded(model, part)
                loss = model.language_model(
                    inputs_embeds=inputs,
                    attention_mask=mask,
                    labels=labels,
                    num_items_in_batch=num_targets,
                    use_cache=False,
                ).loss
            loss.backward()
            losses.append(loss.detach())
    return torch.stack(losses).sum()


def _ours(
    build: Callable[..., VLM], batches: list[VLMBatch], flop: float, *, loss_kernel: str = "auto", **options: Any
) -> Work:
    return _work(build(**options), batches, flop, partial(packed_step, kernel=loss_kernel))


def _transformers(build: Callable[..., VLM], batches: list[VLMBatch], flop: float) -> Work:
    model = build(gradient_checkpointing=True)
    model.language_model.set_attn_implementation("sdpa")
    return _work(model, batches, flop, padded_step)


def _work(model: VLM, batches: list[VLMBatch], flop: float, passes: Step) -> Work:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step() -> None:
        passes(model, batches)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def outputs() -> dict[str, Tensor]:
        loss = passes(model, batches)
        found = _checked(model, loss)
        optimizer.zero_grad()
        return found

    tokens = sum(model.count_tokens(batch) for batch in batches)
    return Work(step, outputs, {"flop": flop, "token": float(tokens)})


def _checked(model: VLM, loss: Tensor) -> dict[str, Tensor]:
    """The loss and a few gradients, far apart in the model."""
    assert model.connector is not None
    down = [value for name, value in model.named_parameters() if "mlp" in name and "down_proj" in name]
    first: Any = next(model.connector.parameters())
    return {"loss": loss, "connector": first.grad.clone(), "first": down[0].grad.clone(), "last": down[-1].grad.clone()}  # type: ignore[union-attr]


def _reference(build: Callable[..., VLM], batches: list[VLMBatch]) -> dict[str, Tensor]:
    """Every sequence by itself, plain losses, nothing compiled; at the sizes that are checked."""
    model = build(attention="padded")
    num_targets = sum(batch.num_targets for batch in batches)
    total = torch.zeros((), device=batches[0].input_ids.device)
    for batch in batches:
        loss = loss_of(model, batch, kernel="plain") / num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return _checked(model, total)


def _build(problem: Problem, sizes: Sizes, *, moe_kernel: str = "auto", **options: Any) -> VLM:
    moe = {**MOE, "kernel": moe_kernel} if problem.is_sparse else None
    return build_vlm(sizes.vision_encoder, "mlp2x_gelu", sizes.language_model, moe=moe, **options)


def _flop(model: VLM, batch: VLMBatch) -> float:
    lengths, num_targets, num_images = _shape(model, batch)
    return training_flops(model, lengths, num_targets=num_targets, num_images=num_images)


def _shape(model: VLM, batch: VLMBatch) -> tuple[Sequence[int], int, int]:
    return model.sequence_lengths(batch), batch.num_targets, batch.num_images


def _seconds_at_ceiling(flop: float, ceilings: Ceilings) -> float:
    return flop / ceilings.flop_per_second


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def _draw_batch(lengths: Sequence[int], num_visual: int, side: int, vocab_size: int, device: torch.device) -> VLMBatch:
    """Sequences of a question with an image and an answer; a quarter of all tokens is answer."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids, labels, segments = [], [], []
    for length in lengths:
        num_text = length - num_visual + 1  # the image is one placeholder
        num_answer = min(length // 4, num_text - 2)
        tokens = torch.randint(3, vocab_size, (num_text,), generator=generator)
        target = torch.full_like(tokens, IGNORE_INDEX)
        target[-num_answer:] = tokens[-num_answer:]
        segment = torch.full_like(tokens, int(Segment.QUESTION))
        segment[-num_answer:] = int(Segment.ANSWER)
        tokens[1], segment[1] = IMAGE_TOKEN_ID, int(Segment.IMAGE)
        ids.append(tokens)
        labels.append(target)
        segments.append(segment)
    num_sequences = len(lengths)
    labels_T = torch.cat(labels)
    return VLMBatch(
        input_ids=torch.cat(ids),
        labels=labels_T,
        segments=torch.cat(segments),
        lengths=tuple(len(one) for one in ids),
        num_targets=int((labels_T != IGNORE_INDEX).sum()),
        image_sequences=tuple(range(num_sequences)),
        images={"default": torch.randn(num_sequences, 3, side, side, generator=generator)},
        sources=torch.zeros(num_sequences, dtype=torch.int64),
        pair_ids=torch.full((num_sequences,), NO_PAIR),
        is_chosen=torch.zeros(num_sequences, dtype=torch.bool),
    ).to(device)


def _padded(model: VLM, batch: VLMBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, S, D], mask [B, S] and labels [B, S] on the right of which padding stands."""
    inputs = model.embed(batch)
    splice = inputs.splice
    labels_U = torch.full_like(splice.segments, IGNORE_INDEX)
    supervised_R = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
    labels_U[splice.text_positions[supervised_R]] = batch.labels[supervised_R]
    embeds = nn.utils.rnn.pad_sequence(list(inputs.inputs_embeds.split(splice.lengths)), batch_first=True)
    labels = nn.utils.rnn.pad_sequence(
        list(labels_U.split(splice.lengths)), batch_first=True, padding_value=IGNORE_INDEX
    )
    lengths_B1 = torch.tensor(splice.lengths, device=embeds.device)[:, None]
    return embeds, (torch.arange(embeds.shape[1], device=embeds.device) < lengths_B1).long(), labels
