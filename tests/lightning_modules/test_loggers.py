import csv
import json
from pathlib import Path

import pytest

from lightning_modules.callbacks.checkpoint import StepCheckpoint
from lightning_modules.loggers import JsonlLogger, read_rows
from tests.lightning_modules.runs import fit, make_batch, make_stage


@pytest.fixture
def logger(tmp_path: Path) -> JsonlLogger:
    return JsonlLogger(str(tmp_path))


def test_a_row_keeps_step_time_and_every_digit(logger: JsonlLogger) -> None:
    value = 0.1 + 0.2
    logger.log_metrics({"train/loss": value}, step=3)
    (row,) = read_rows(logger.path)
    assert row["step"] == 3
    assert row["train/loss"] == value
    assert row["time"] > 0


def test_a_torn_last_line_is_replaced_by_the_next_row(logger: JsonlLogger) -> None:
    logger.log_metrics({"train/loss": 1.0}, step=0)
    with logger.path.open("a") as file:
        file.write('{"step": 1, "train/lo')
    assert [row["step"] for row in read_rows(logger.path)] == [0]
    logger.log_metrics({"train/loss": 2.0}, step=1)
    assert [json.loads(line)["step"] for line in logger.path.read_text().splitlines()] == [0, 1]


def test_rows_behind_the_checkpoint_are_dropped(logger: JsonlLogger) -> None:
    logger.log_metrics({"val/loss": 9.0}, step=0)  # before training
    for step in range(4):
        logger.log_metrics({"train/loss": float(step)}, step=step)
        logger.log_metrics({"val/loss": float(step)}, step=step)  # after that step
    logger.drop_rows_after(2)
    rows = read_rows(logger.path)
    assert [row["step"] for row in rows if "train/loss" in row] == [0, 1]
    assert [row["val/loss"] for row in rows if "val/loss" in row] == [9.0, 0.0, 1.0]


def test_dropping_from_no_file_does_nothing(logger: JsonlLogger) -> None:
    logger.drop_rows_after(2)
    assert not logger.path.exists()


def test_the_record_of_a_resumed_run_is_that_of_an_unbroken_one(tmp_path: Path) -> None:
    """The run to resume went on for a step after its checkpoint."""
    steps, often = [make_batch(index) for index in range(4)], {"val_check_interval": 2, "check_val_every_n_epoch": None}
    records = []
    for name in ("unbroken", "resumed"):
        logger = JsonlLogger(str(tmp_path / name))
        options = {"logger": logger, "val": [make_batch(9)], "enable_checkpointing": True, **often}
        saving = StepCheckpoint(tmp_path / name, every_n_steps=2, keep=-1)
        if name == "resumed":
            fit(make_stage("moe_tuning"), steps, max_steps=3, callbacks=[saving], **options)
            options.update(done=2, ckpt_path=tmp_path / name / "step_000002.ckpt")
        fit(make_stage("moe_tuning"), steps, callbacks=[saving], **options)
        records.append([{key: value for key, value in row.items() if key != "time"} for row in read_rows(logger.path)])
    assert records[0] == records[1]
    assert [row["step"] for row in records[0] if "train/loss" in row] == [0, 1, 2, 3]
    assert [row["step"] for row in records[0] if "val/loss" in row] == [1, 3]


def test_the_csv_has_every_row_and_a_column_for_every_name(logger: JsonlLogger) -> None:
    logger.log_metrics({"train/loss": 0.1 + 0.2, "optim/lr": 1.0}, step=0)
    logger.log_metrics({"val/loss": 2.0}, step=0)
    logger.finalize("success")
    with logger.path.with_name("metrics.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["step", "time", "train/loss", "optim/lr", "val/loss"]
    assert float(first["train/loss"]) == 0.1 + 0.2
    assert (first["val/loss"], second["train/loss"], second["val/loss"]) == ("", "", "2.0")
    assert [path.name for path in logger.path.parent.iterdir() if path.name.startswith(".")] == []


def test_a_resumed_run_writes_the_csv_anew(logger: JsonlLogger) -> None:
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0}, step=step)
    logger.finalize("failed")
    logger.drop_rows_after(1)
    logger.finalize("success")
    assert len(logger.path.with_suffix(".csv").read_text().splitlines()) == 2


def test_nothing_logged_makes_no_csv(logger: JsonlLogger) -> None:
    logger.finalize("success")
    assert not logger.path.with_suffix(".csv").exists()
