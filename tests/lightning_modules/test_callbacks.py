import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_modules.callbacks.checkpoint import StepCheckpoint
from lightning_modules.callbacks.rejection_monitor import RejectionMonitor
from lightning_modules.callbacks.routing_monitor import RoutingCounts, RoutingMonitor, load_map
from lightning_modules.callbacks.run_identity import RunIdentity
from lightning_modules.callbacks.throughput_monitor import ThroughputMonitor
from lightning_modules.loggers import JsonlLogger, read_rows
from lightning_modules.objective import StepRouting
from moevlm.batch import Routing, Segment
from moevlm.models.counting import training_flops
from tests.lightning_modules.runs import fit, loader, make_batch, make_stage, parameters_of, quiet_trainer


def make_step(expert_ids: list[list[int]], segments: list[int], num_experts: int = 2) -> StepRouting:
    ids = torch.tensor(expert_ids)
    probs = torch.nn.functional.one_hot(ids[:, 0], num_experts).float()
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    dropped[0, 0] = True
    return StepRouting({1: Routing(probs, probs, ids, torch.ones_like(probs), dropped)}, torch.tensor(segments))


def test_shares_are_taken_after_counts_were_added_up() -> None:
    """One micro-batch of 3 image tokens, one of 1 answer token: not the mean of two means."""
    counts = RoutingCounts()
    counts.add([make_step([[0], [0], [1]], [Segment.IMAGE] * 3), make_step([[1]], [Segment.ANSWER])])
    shares = counts.shares()[1]
    assert shares["load"].tolist() == [0.5, 0.5]
    assert shares["image_load"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert shares["text_load"].tolist() == [0.0, 1.0]
    assert shares["importance"].tolist() == [0.5, 0.5]
    assert shares["entropy"] == 0
    assert shares["dropped_fraction"] == 0.5
    assert RoutingCounts().shares() == {}


def test_layers_with_other_numbers_of_experts_share_one_map() -> None:
    shares = {1: {"load": torch.tensor([0.5, 0.5])}, 3: {"load": torch.tensor([0.1, 0.2, 0.7])}}
    image = load_map(shares)
    assert image.dtype.name == "uint8"
    assert image.shape[2] == 3


def test_the_monitor_logs_a_few_numbers_a_step_and_the_grid_at_validation(tmp_path: Path) -> None:
    logger = JsonlLogger(str(tmp_path))
    options: dict[str, Any] = {"val": [make_batch(1)], "val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(make_stage("moe_tuning"), [make_batch()] * 2, logger=logger, callbacks=[RoutingMonitor()], **options)
    train, val = read_rows(logger.path)[1], read_rows(logger.path)[-1]  # the first row is the model's
    assert {key for key in train if "layer" in key} == {
        f"train/{name}/layer_00" for name in ("max_over_mean_load", "router_entropy", "dropped_fraction")
    }
    assert not [key for key in train if key.startswith("moe/")]
    for prefix in ("moe/load", "moe/importance", "moe/load_by_modality/image", "moe/load_by_modality/text"):
        values = [val[f"{prefix}/layer_00/expert_{expert:02d}"] for expert in range(4)]
        assert sum(values) == pytest.approx(1)
    assert 0 < val["moe/entropy/layer_00"] <= 1.3863
    assert val["moe/dropped_fraction/layer_00"] == 0


def test_monitors_change_no_result_and_dense_models_log_nothing_of_routers() -> None:
    watched, plain = make_stage("instruction_tuning"), make_stage("instruction_tuning")
    callbacks = [RoutingMonitor(), ThroughputMonitor(every_n_steps=1), RunIdentity()]
    trainer = fit(watched, [make_batch()] * 2, callbacks=callbacks, val=[make_batch(1)], check_val_every_n_epoch=1)
    fit(plain, [make_batch()] * 2)
    for key, value in parameters_of(plain).items():
        assert torch.equal(parameters_of(watched)[key], value), key
    assert not [key for key in trainer.callback_metrics if "layer" in key]
    assert trainer.callback_metrics["perf/tokens_per_second"] > trainer.callback_metrics["perf/samples_per_second"] > 0
    assert trainer.callback_metrics["perf/peak_memory_gib"] > 0.05


def test_mfu_is_the_steps_flops_over_the_ceilings() -> None:
    stage, batches = make_stage("moe_tuning"), [make_batch()] * 2
    monitor = ThroughputMonitor(every_n_steps=2, ceiling_tflops=1e-3)
    trainer = fit(stage, batches, callbacks=[monitor])
    metrics = trainer.callback_metrics
    flop = sum(
        training_flops(
            stage.model, stage.model.sequence_lengths(one), num_targets=one.num_targets, num_images=one.num_images
        )
        for one in batches
    )
    seconds = sum(one.num_sequences for one in batches) / metrics["perf/samples_per_second"].item()
    assert metrics["perf/mfu"].item() == pytest.approx(flop / seconds / 1e9, rel=1e-4)
    with pytest.raises(ValueError, match="ceiling_tflops must be positive"):
        ThroughputMonitor(ceiling_tflops=0)


def test_waiting_for_data_is_a_share_of_the_same_time_as_tokens_a_second(tmp_path: Path) -> None:
    class Slow(LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.train_loader = SimpleNamespace(waited_seconds=5.0)  # of before

        def train_dataloader(self) -> Any:
            for batch in loader([make_batch()] * 4):
                time.sleep(0.3)
                self.train_loader.waited_seconds += 0.3
                yield batch

    logger = JsonlLogger(str(tmp_path))
    trainer = quiet_trainer(max_steps=4, logger=logger, callbacks=[ThroughputMonitor(every_n_steps=2)])
    trainer.fit(make_stage("connector_alignment"), datamodule=Slow())
    shares = [row["perf/data_wait_fraction"] for row in read_rows(logger.path) if "perf/data_wait_fraction" in row]
    assert len(set(shares)) == 2
    assert all(0.3 < share <= 1.05 for share in shares)


def test_checkpoints_come_every_n_steps_and_after_the_last_and_the_newest_stay(tmp_path: Path) -> None:
    callbacks = [StepCheckpoint(tmp_path, every_n_steps=2, keep=2)]
    fit(make_stage("connector_alignment"), [make_batch()] * 5, callbacks=callbacks, enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004.ckpt", "step_000005.ckpt"]
    assert sorted(path.name for path in (tmp_path / "step_000005.ckpt").iterdir()) == ["checkpoint.pt", "manifest.json"]
    with pytest.raises(ValueError, match="keep must be positive"):
        StepCheckpoint(tmp_path, keep=0)
    with pytest.raises(ValueError, match="at least 1, or null, got 0"):
        StepCheckpoint(tmp_path, every_n_steps=0)


def test_intervals_below_one_are_refused() -> None:
    for monitor in (RoutingMonitor, ThroughputMonitor):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            monitor(every_n_steps=0)


def test_the_load_map_and_the_run_identity_reach_wandb(tmp_path: Path) -> None:
    logger = WandbLogger(project="test", id="abc123", group="chain", offline=True, save_dir=tmp_path)
    callbacks = [RoutingMonitor(), RunIdentity()]
    options: dict[str, Any] = {"val": [make_batch(1)], "val_check_interval": 1, "check_val_every_n_epoch": None}
    trainer = fit(make_stage("moe_tuning"), [make_batch()], logger=logger, callbacks=callbacks, **options)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    logger.experiment.finish()
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["RunIdentity"]
    assert state == {"id": "abc123", "group": "chain"}
    assert list(tmp_path.glob("wandb/offline-run-*-abc123/files/media/images/moe/load_map_*.png"))


def test_a_checkpoint_that_goes_on_as_another_run_is_named(tmp_path: Path) -> None:
    identity = RunIdentity()
    logger = WandbLogger(project="test", id="new", offline=True, save_dir=tmp_path)
    trainer: Any = SimpleNamespace(loggers=[CSVLogger(tmp_path), logger])
    identity.setup(trainer, None, "fit")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="W&B run old of group chain, and goes on as new"):
        identity.load_state_dict({"id": "old", "group": "chain"})
    assert RunIdentity().state_dict() == {}


def test_the_rejections_of_each_step_are_logged(tmp_path: Path) -> None:
    class Counting(LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.train_rejections = SimpleNamespace(num_rejected=0)

        def train_dataloader(self) -> Any:
            for number, batch in enumerate(loader([make_batch()] * 3)):
                self.train_rejections.num_rejected += number
                yield batch

    logger = JsonlLogger(str(tmp_path))
    trainer = quiet_trainer(max_steps=3, logger=logger, callbacks=[RejectionMonitor()])
    trainer.fit(make_stage("connector_alignment"), datamodule=Counting())
    assert sum(row.get("data/rejected_samples", 0) for row in read_rows(logger.path)) == 3


def test_what_a_model_costs_is_printed_and_logged_once_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = JsonlLogger(str(tmp_path))
    stage = make_stage("moe_tuning")
    fit(stage, [make_batch()] * 2, logger=logger)
    printed = capsys.readouterr().out
    assert "activated" in printed
    assert "with idle rows of a static capacity buffer" in printed
    row, *others = read_rows(logger.path)
    assert row["step"] == 0
    assert row["model/total_parameters"] == sum(parameter.numel() for parameter in stage.model.parameters())
    trained = sum(parameter.numel() for parameter in stage.model.parameters() if parameter.requires_grad)
    assert row["model/trainable_parameters"] == trained < row["model/activated_parameters"]
    assert row["model/activated_parameters"] < row["model/total_parameters"]
    assert row["model/forward_flops_per_token_with_idle_rows"] == row["model/forward_flops_per_token"] > 0
    assert row["model/forward_flops_per_image"] > 0
    assert not [key for other in others for key in other if key.startswith("model/")]
