"""Short fits of stages on in-memory batches."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from lightning_modules.base import VLMStage
from lightning_modules.connector_alignment import ConnectorAlignment
from lightning_modules.instruction_tuning import InstructionTuning
from lightning_modules.mimic_distillation import MimicDistillation
from lightning_modules.moe_tuning import MoETuning
from lightning_modules.preference_distillation import PreferenceDistillation
from moevlm.batch import VLMBatch
from moevlm.models.adapter_settings import LoRASettings
from moevlm.models.adapters import add_lora
from moevlm.models.modular import ModularVLM
from moevlm.models.upcycling import upcycle
from moevlm.models.vlm import VLM
from tests.tiny import tiny_batch, tiny_decoder_config, tiny_vlm

MOE = {"num_experts": 4, "top_k": 2, "placement": "interval"}
SHARED_AND_BIASED = {"bias_update_rate": 0.01, "shared_expert": "partition", "shared_fraction": 0.5}
SHAPE = {"num_hidden_layers": 2}


def build_dense(seed: int = 0, *, gradient_checkpointing: bool = False, **changes: Any) -> VLM:
    """Embeddings and head are large enough to say something while they are frozen."""
    decoder = tiny_decoder_config(**SHAPE, **changes)
    vlm = tiny_vlm(seed=seed, language_model=decoder, gradient_checkpointing=gradient_checkpointing)
    vlm.language_model.get_output_embeddings().weight.data *= 20
    return vlm


def build_sparse(seed: int = 0, *, moe: Mapping[str, Any] | None = None, **changes: Any) -> VLM:
    """Experts are moved apart, so that a step depends on the routing."""
    vlm = upcycle(build_dense(seed, **changes), **{**MOE, **(moe or {})})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in vlm.moe_layers.values():
            for parameter in layer.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vlm


build_teacher = partial(build_dense, seed=7, hidden_size=48, vocab_size=336)
sgd = partial(torch.optim.SGD, lr=0.5)
adamw = partial(torch.optim.AdamW, lr=1e-2)

STAGES: dict[str, Any] = {
    "connector_alignment": partial(ConnectorAlignment, build_dense),
    "instruction_tuning": partial(InstructionTuning, build_dense),
    "moe_tuning": partial(MoETuning, build_sparse),
    "mimic_distillation": partial(MimicDistillation, build_sparse, build_teacher, loss_weights={"lm": 0.5}),
    "preference_distillation": partial(
        PreferenceDistillation, build_sparse, build_teacher=build_teacher, loss_weights={"lm": 0.5}
    ),
}

EVERY_TERM = {"lm": 0.5, "visual_kd": 0.3, "hidden": 0.1, "relation": 0.4, "affinity": 0.5, "attention": 0.6}

RANK_CASES: dict[str, Any] = {
    **STAGES,
    "mimic_with_every_term": partial(
        MimicDistillation,
        build_sparse,
        build_teacher,
        loss_weights=EVERY_TERM,
        trainable=["^connector", "^language_model"],
        kd_tokens="text",
        terms={"hidden_layers": [[0, 1], [1, 0]], "hidden_tokens": "all", "attention_layers": [[0, [0, 1]]]},
        source_names=["only"],
        adaptive_weights={"losses": ["kd", "relation"], "rule": "loss_trend", "window": 2},
    ),
    "mimic_by_gradient_norm": partial(
        MimicDistillation,
        build_dense,
        build_teacher,
        divergence="jsd",
        temperature=2.0,
        token_weighting="teacher_correctness",
        loss_weights={"lm": 0.5},
        adaptive_weights={"losses": ["kd", "lm"], "window": 2},
    ),
    "untied_head_and_vision": partial(
        InstructionTuning,
        partial(build_dense, tie_word_embeddings=False),
        trainable=["connector", "language_model", "vision_encoder"],
    ),
    "kto_against_both": partial(
        PreferenceDistillation, build_sparse, build_teacher=build_teacher, reference="blend", loss="kto_pair"
    ),
    "kto": partial(PreferenceDistillation, build_sparse, build_teacher=build_teacher, loss="kto", aggregation="mean"),
    "adversarial_routing": partial(MoETuning, lambda: build_adversarial()),
    "several_teachers": partial(
        MimicDistillation,
        build_sparse,
        None,
        build_teachers={"wide": build_teacher, "other": partial(build_dense, seed=9)},
        teacher_of_source=["wide", "other"],
        loss_weights={"lm": 0.5, "load_balancing": 0.0},
    ),
    "strong_balance": partial(
        MoETuning,
        partial(build_sparse, gradient_checkpointing=True, moe=SHARED_AND_BIASED),
        loss_weights={"load_balancing": 10.0},
        router_losses_over_layers="sum",
    ),
    "no_balance": partial(
        MoETuning,
        partial(build_sparse, gradient_checkpointing=True, moe=SHARED_AND_BIASED),
        loss_weights={"load_balancing": 0.0},
    ),
    "lora_experts": partial(
        MoETuning,
        lambda: build_adapted(),
        trainable=["lora_", "router", "coefficient", "^connector"],
    ),
    "on_policy": partial(
        MimicDistillation,
        build_sparse,
        build_teacher,
        on_policy={"fraction": 1.0, "max_new_tokens": 4, "temperature": 0.0},
        divergence="jsd",
        loss_weights={"load_balancing": 0.0},
    ),
    "modular_experts": partial(
        InstructionTuning,
        lambda: build_modular(),
        trainable=["^connector", "^language_model", "^other_decoders", "^domain_router"],
        loss_weights={"domain_router": 1.0},
    ),
    "replicated_teacher": partial(
        MimicDistillation, build_sparse, build_teacher, teacher_options={"placement": "replicated"}
    ),
    "offloaded_teacher_of_the_same_vision": partial(
        MimicDistillation,
        build_sparse,
        partial(build_dense, hidden_size=48),
        teacher_options={"placement": "offloaded"},
    ),
}
"""What `test_ranks.py` compares with a single process."""


def build_adapted() -> VLM:
    """LoRA experts in a residual layer, and peft's adapters on whatever is linear."""
    vlm = build_sparse(moe={"experts": "lora", "lora_rank": 4, "residual": True})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return add_lora(vlm, LoRASettings(rank=2))


def build_modular() -> ModularVLM:
    """Two whole-model experts and a common one, moved apart."""
    vlm = ModularVLM(build_dense(), num_experts=2, has_common=True)
    with torch.no_grad():
        for decoder in vlm.other_decoders:
            for parameter in decoder.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return vlm


def build_adversarial() -> VLM:
    """Its first MoE layer sends tokens with ids below 128 to the first of two experts, the others to the second."""
    vlm = tiny_vlm({**MOE, "num_experts": 2, "top_k": 1}, language_model=tiny_decoder_config(**SHAPE))
    with torch.no_grad():
        sign = torch.where(torch.arange(vlm.language_model.config.vocab_size) < 128, 1.0, -1.0)
        vlm.language_model.get_input_embeddings().weight[:, 0] = 5 * sign
        vlm.moe_layers[0].router.weight[:, 0] = torch.tensor([1.0, -1.0])
    return vlm


class KTOOfBothRanks(PreferenceDistillation):
    """In one process what two ranks do: KTO's reference point is over the micro-batches that run at the same time."""

    def _mismatched_kl(self, batch: VLMBatch) -> Tensor:
        for step in rank_steps(None, "kto"):
            for place, other in enumerate(step):
                if torch.equal(other.input_ids, batch.input_ids):
                    both = [other, step[(place + len(step) // 2) % len(step)]]
                    means = [PreferenceDistillation._mismatched_kl(self, one) for one in both]
                    return sum(mean * one.num_pairs for mean, one in zip(means, both)) / sum(
                        one.num_pairs for one in both
                    )
        raise AssertionError("a batch of no step")


def make_alone(name: str) -> VLMStage:
    """The stage of a case for one process that takes the micro-batches of both ranks."""
    if name != "kto":
        return make_stage(name, optimizer=sgd)
    case = RANK_CASES[name]
    return KTOOfBothRanks(*case.args, optimizer=sgd, **case.keywords)


def make_stage(name: str, optimizer: Any = adamw, **changes: Any) -> VLMStage:
    stage = RANK_CASES[name](optimizer=optimizer, **changes)
    assert isinstance(stage, VLMStage)
    return stage


def make_batch(seed: int = 0, num_sequences: int = 4) -> VLMBatch:
    """Pairs of sequences, some with an image, some without; every two form a preference pair."""
    letters = ("siqqaa", "siqqa", "sqqaaa", "sqqa")[:num_sequences]
    return tiny_batch(letters, pairs=True, content_seed=100 * seed)


def quiet_trainer(folder: Path | None = None, **options: Any) -> lightning.Trainer:
    """A trainer without bars, summaries and files."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "inference_mode": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return lightning.Trainer(**{**defaults, **options})


def loader(items: Sequence[Any]) -> torch.utils.data.DataLoader:
    """One item is one optimizer step (or one validation batch)."""
    return torch.utils.data.DataLoader(list(items), batch_size=None, shuffle=False)  # type: ignore[arg-type]


def fit(stage: lightning.LightningModule, steps: Sequence[Any], **options: Any) -> lightning.Trainer:
    """One optimizer step for each item of `steps`.

    `val` holds validation items. With `ckpt_path` the run goes on after `done` steps: the loader begins behind them,
    and is as long as before (Lightning counts on where it was).
    """
    val, ckpt_path, done = options.pop("val", None), options.pop("ckpt_path", None), options.pop("done", 0)
    trainer = quiet_trainer(**{"max_steps": len(steps), **options})
    items = [*steps[done:], *steps[:done]]
    trainer.fit(stage, loader(items), None if val is None else loader(val), ckpt_path=ckpt_path)
    return trainer


def parameters_of(stage: VLMStage) -> dict[str, Tensor]:
    """Copies of the model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in stage.model.named_parameters()}


def rank_logits(rank: int) -> Tensor:
    """Router logits of one rank's tokens: the ranks have other numbers of them, and prefer other experts."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(5 + 4 * rank, 4, generator=generator) + 2 * torch.eye(4)[rank]


def selection_biases(model: torch.nn.Module) -> dict[str, Tensor]:
    """The routers' biases of loss-free balancing, by name."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("selection_bias")}


def initial_parameters(name: str) -> dict[str, Tensor]:
    """The parameters that `make_stage(name)` starts from."""
    return {key: parameter.detach() for key, parameter in RANK_CASES[name].args[0]().named_parameters()}


def rank_steps(rank: int | None, name: str = "") -> list[list[VLMBatch]]:
    """Two optimizer steps of one rank of two, or with None those of a single process: the same micro-batches.

    The ranks differ as much as they may: in the first step only the first has images, and the second's last micro-batch
    has no label.
    """
    image, text, unlabelled = ("siqqaaaa", "siqqaa"), ("sqqqqqqa", "sqqqa"), ("sqqqqq", "sqqq")
    letters = [[[image, text], [text, unlabelled]], [[text, image], [image, text]]]  # step, rank, micro-batch
    if name == "adversarial_routing":
        letters = [[[text, text], [text, text]]] * 2
    if name == "kto":  # two pairs are mismatched, three in the second rank's micro-batches
        letters = [[[micro * (2 + number) for micro in row] for number, row in enumerate(step)] for step in letters]
    steps = []
    for index, step in enumerate(letters):
        ranks = [
            [
                _rank_batch(letters, 1000 * index + 100 * number + 10 * micro, number, name)
                for micro, letters in enumerate(row)
            ]
            for number, row in enumerate(step)
        ]
        steps.append([*ranks[0], *ranks[1]] if rank is None else ranks[rank])
    return steps


def _rank_batch(letters: Sequence[str], content_seed: int, rank: int, name: str) -> VLMBatch:
    if name in ("several_teachers", "modular_experts"):  # the second rank has no sequence of the second source
        sources = torch.arange(len(letters)) % 2 * (1 - rank)
        return dataclasses.replace(tiny_batch(letters, content_seed=content_seed), sources=sources)
    if name != "adversarial_routing":
        return tiny_batch(letters, pairs=True, content_seed=content_seed)
    batch = tiny_batch(letters, pairs=True, content_seed=content_seed, vocab_size=128)
    labels = torch.where(batch.labels >= 0, batch.labels + 128 * rank, batch.labels)
    return dataclasses.replace(batch, input_ids=batch.input_ids + 128 * rank, labels=labels)
