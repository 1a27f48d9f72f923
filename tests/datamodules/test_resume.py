"""With a real Trainer: what a stopped and resumed run reads is what an unbroken run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.instructions import InstructionDataModule
from datamodules.position import check_position
from moevlm.batch import VLMBatch
from tests.samples import llava_record, make_shards, small_processor

NUM_STEPS = 7
Rows = list[tuple[int, int, tuple[str, ...]]]


class Recorder(lightning.LightningModule):
    """A stage in miniature: manual optimization, one optimizer step for each loader item."""

    def __init__(self, *, peek: bool = False, stop_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.peek, self.stop_at = peek, stop_at
        self.rows: Rows = []
        self.validated: list[str] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.peek:  # what a look at estimated_stepping_batches may do: make the loader before the state is restored
            self.trainer.fit_loop.setup_data()
        return torch.optim.SGD([self.weight], lr=0.1)

    def training_step(self, step: list[VLMBatch], batch_idx: int) -> None:
        if self.stop_at == batch_idx:
            raise KeyboardInterrupt
        self.rows.append((batch_idx, step[0].position, tuple(key for batch in step for key in batch.keys)))
        optimizer: Any = self.optimizers()
        self.manual_backward((self.weight * sum(batch.num_targets for batch in step)).sum())
        optimizer.step()

    def validation_step(self, step: list[VLMBatch], batch_idx: int) -> None:
        self.validated += [key for batch in step for key in batch.keys]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [llava_record(number) for number in range(10)]
    return make_shards(tmp_path_factory.mktemp("data"), records, samples_per_shard=4)


def module_of(shards: Path, **options: Any) -> InstructionDataModule:
    source = [{"name": "made_up", "shards": str(shards)}]
    settings = {"num_steps": NUM_STEPS, "global_batch_size": 4, "micro_batch_size": 2, **options}
    return InstructionDataModule(source, small_processor(), validation_sources=source, **settings)


def fit(
    folder: Path, stage: Recorder, module: InstructionDataModule, *, resume: bool = False, steps: int = NUM_STEPS
) -> Any:
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=[checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        default_root_dir=folder,
    )
    trainer.fit(stage, module, ckpt_path=str(folder / "step=3.ckpt") if resume else None)
    return trainer


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    stage = Recorder()
    fit(tmp_path_factory.mktemp("unbroken"), stage, module_of(shards))
    return stage


def test_an_unbroken_run_takes_every_step_once_and_validates_between(unbroken: Recorder) -> None:
    assert [row[:2] for row in unbroken.rows] == [(step, step * 4) for step in range(NUM_STEPS)]
    assert unbroken.validated[-10:] == [f"s{number:04d}" for number in range(10)]


@pytest.mark.parametrize(("num_workers", "peek"), [(0, False), (2, False), (0, True), (2, True)])
def test_a_stopped_and_resumed_run_reads_what_an_unbroken_one_reads(
    shards: Path, tmp_path: Path, unbroken: Recorder, num_workers: int, peek: bool
) -> None:
    first = Recorder(stop_at=4)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, first, module_of(shards))
    second = Recorder(peek=peek)
    trainer = fit(tmp_path, second, module_of(shards, num_workers=num_workers), resume=True)
    assert first.rows[:3] + second.rows == unbroken.rows
    assert trainer.global_step == NUM_STEPS


def test_a_finished_run_reads_nothing_more(shards: Path, tmp_path: Path) -> None:
    fit(tmp_path, Recorder(), module_of(shards, num_steps=3), steps=3)
    stage = Recorder()
    fit(tmp_path, stage, module_of(shards, num_steps=3), resume=True, steps=3)
    assert stage.rows == []


def test_a_checkpoint_of_other_data_is_refused(shards: Path, tmp_path: Path) -> None:
    fit(tmp_path, Recorder(), module_of(shards, num_steps=3), steps=3)
    with pytest.raises(ValueError, match="seed was 0, is 9"):
        fit(tmp_path, Recorder(), module_of(shards, seed=9), resume=True)


def test_more_trainer_steps_than_the_loader_has_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_steps=9 exceeds data.num_steps=7"):
        fit(tmp_path, Recorder(), module_of(shards), steps=9)


def test_data_at_another_position_than_the_optimizer_is_refused(shards: Path) -> None:
    (step, *_) = module_of(shards).train_dataloader()
    check_position(step, 0)
    with pytest.raises(RuntimeError, match="the data stands at sample 0, the optimizer at 4"):
        check_position(step, 4)
