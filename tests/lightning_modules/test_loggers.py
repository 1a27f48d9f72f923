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
