"""Short fits of stages on in-memory batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
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
from moevlm.models.vlm import VLM
from tests.tiny import tiny_batch, tiny_decoder_config, tiny_vlm

MOE = {"num_experts": 4, "top_k": 2, "placement": "interval"}
SHAPE = {"num_hidden_layers": 2}


def build_dense(seed: int = 0, **changes: Any) -> VLM:
    return tiny_vlm(seed=seed, language_model=tiny_decoder_config(**SHAPE, **changes))


def build_sparse(seed: int = 0, **changes: Any) -> VLM:
    """Experts are moved apart, so that a step depends on the routing."""
    vlm = tiny_vlm(MOE, seed=seed, language_model=tiny_decoder_config(**SHAPE, **changes))
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


def make_stage(name: str, optimizer: Any = adamw, **changes: Any) -> VLMStage:
    stage = STAGES[name](optimizer=optimizer, **changes)
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


class Steps(torch.utils.data.Dataset):
    """A loader's data: one item is one optimizer step."""

    def __init__(self, steps: Sequence[Any], start: int = 0) -> None:
        self.steps, self.start = steps, start

    def __len__(self) -> int:
        return len(self.steps) - self.start

    def __getitem__(self, index: int) -> Any:
        return self.steps[self.start + index]


def loader(steps: Sequence[Any], start: int = 0) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Steps(steps, start), batch_size=None)


def fit(stage: lightning.LightningModule, steps: Sequence[Any], **options: Any) -> lightning.Trainer:
    """One optimizer step for each item of `steps`; `val` holds validation items."""
    val, folder, ckpt_path = options.pop("val", None), options.pop("folder", None), options.pop("ckpt_path", None)
    start = options.pop("start", 0)
    trainer = quiet_trainer(folder, **{"max_steps": len(steps), **options})
    trainer.fit(stage, loader(steps, start), None if val is None else loader(val), ckpt_path=ckpt_path)
    return trainer


def parameters_of(stage: VLMStage) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in stage.model.named_parameters()}


def cycle(items: Sequence[Any], length: int) -> Iterator[Any]:
    for index in range(length):
        yield items[index % len(items)]
