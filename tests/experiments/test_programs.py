"""What a person sees when the input is bad: one line that says what, where and what to change."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import analyze_routing, build_shards, evaluate, make_world, pipeline, train
from experiments.program import error_message
from moevlm.data.index import read_index
from moevlm.data.reader import IndexedShards
from tests.experiments.conftest import TINY_RUN, Ended
from tests.samples import image_bytes, llava_record, make_shards, write_llava

Console = Callable[..., Ended]
TrainOn = Callable[..., Ended]
GOOD = [llava_record(number) for number in range(12)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def only_line(ended: Ended) -> str:
    """The single line, warnings apart, on stderr of a program that a user error ended."""
    assert ended.code == 2, ended
    (line,) = [line for line in ended.errors if not line.startswith("WARNING: ")]
    assert line.startswith("error: ")
    return line


@pytest.fixture
def bad_records(tmp_path: Path) -> list[str]:
    """Twelve good records and three bad ones, as arguments of build_shards."""
    bad = [llava_record(20, id="unreadable"), llava_record(21, id="missing"), {"id": "silent", "conversations": []}]
    _, images = write_llava(tmp_path, [*GOOD, *bad])
    (images / "20.png").write_bytes(b"this is no image")
    (images / "21.png").unlink()
    return [f"json={tmp_path}/records.json", f"image_folder={images}", f"output={tmp_path}/shards"]


@pytest.fixture
def train_on(console: Console, world: Path, tmp_path: Path) -> TrainOn:
    """Two steps of four samples from the given source."""

    def trained(source: str, *overrides: str) -> Ended:
        sources = f"data.sources=[{{name: made_up, {source}}}]"
        settings = [*TINY_RUN, f"data_root={world}", f"output_root={tmp_path}", "run_name=run", sources, *overrides]
        return console(train.main, "experiment=mini/instruction_tuning", *settings)

    return trained


def test_unreadable_missing_and_turnless_records_are_counted_and_the_rest_is_kept(
    console: Console, bad_records: list[str], tmp_path: Path
) -> None:
    ended = console(build_shards.main, *bad_records, "max_rejected_fraction=0.5")
    assert ended.code == 0
    assert ended.errors == []
    assert "12 samples in 1 shards" in ended.output
    assert "3 records rejected" in ended.output
    assert len(IndexedShards(tmp_path / "shards")) == 12
    rejected = {row["key"]: row["reason"] for row in rows_of(tmp_path / "shards/rejected.jsonl")}
    assert rejected == {"unreadable": "unreadable_image", "missing": "missing_image", "silent": "no_turns"}


def test_too_many_bad_records_end_in_one_line(console: Console, bad_records: list[str], tmp_path: Path) -> None:
    line = only_line(console(build_shards.main, *bad_records))
    assert "3 of 15 records were rejected" in line
    assert "no_turns 1" in line
    assert str(tmp_path / "shards/rejected.jsonl") in line
    assert "raise max_rejected_fraction" in line


def test_records_that_are_no_json_end_in_one_line(console: Console, tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text("[{")
    line = only_line(console(build_shards.main, f"json={tmp_path}/records.json", f"output={tmp_path}/shards"))
    assert f"{tmp_path}/records.json" in line


def test_an_image_that_breaks_off_is_replaced_in_training_and_named(train_on: TrainOn, tmp_path: Path) -> None:
    json_file, images = write_llava(tmp_path, GOOD[:8])
    (images / "3.png").write_bytes(image_bytes(3)[:-30])
    ended = train_on(f"json: {json_file}, image_folder: {images}")
    assert ended.code == 0
    (line,) = [line for line in ended.errors if "s0003" in line]
    assert line.startswith("WARNING: sample s0003 of made_up replaced: unreadable_image")
    (row,) = rows_of(tmp_path / "run/rejected.jsonl")
    assert (row["key"], row["reason"], row["split"]) == ("s0003", "unreadable_image", "train")


def test_a_broken_tar_costs_its_lost_samples_and_is_named(train_on: TrainOn, tmp_path: Path) -> None:
    shards = break_tar(make_shards(tmp_path, GOOD[:8], samples_per_shard=4))
    ended = train_on(f"shards: {shards}")
    assert ended.code == 0
    (line,) = [line for line in ended.errors if line.startswith("WARNING: broken tar")]
    assert str(shards / "000001.tar") in line
    assert "build or copy it again" in line
    assert {row["reason"] for row in rows_of(tmp_path / "run/rejected.jsonl")} == {"broken_shard"}


def test_a_broken_tar_past_the_limit_ends_in_one_line(train_on: TrainOn, tmp_path: Path) -> None:
    shards = break_tar(make_shards(tmp_path, GOOD[:8], samples_per_shard=4))
    line = only_line(train_on(f"shards: {shards}", "+data.max_rejected_fraction=0"))
    assert "broken_shard" in line
    assert str(tmp_path / "run/rejected.jsonl") in line
    assert "mend the data or raise data.max_rejected_fraction" in line


def break_tar(shards: Path) -> Path:
    """Cut the second tar after its second sample."""
    tar = shards / "000001.tar"
    tar.write_bytes(tar.read_bytes()[: read_index(tar).members(2)[0][1]])
    return shards


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "model.connector=nope",
            "unknown connector 'nope'; known: linear, mlp2x_gelu, norm_mlp2x_gelu, pool_mlp2x_gelu, or anyres_",
        ),
        ("+data.reader=nope", "reader must be one of indexed, streaming, got 'nope'; set data.reader"),
        ("+data.colour=red", "unexpected keyword argument 'colour'; check data"),
        ("num_steps=many", "; check data"),
        (
            "+model.moe={num_experts: x}",
            "num_experts must be a whole number, or a list of whole numbers, got 'x'; set model",
        ),
        ("optimizer.lr=fast", "; set optimizer"),
        ("global_batch_size=5", "must be a multiple of micro_batch_size * world_size = 2 * 1, got 5; set"),
        ("data_root=/nowhere", "source instructions: no shards at /nowhere/shards/"),
        ("processor.chat_template=nope", "stablelm, openchat, got 'nope'; set processor.chat_template"),
        ("model.weights=/nowhere", "no folder /nowhere; set model.weights to a folder"),
    ],
)
def test_a_value_that_nobody_knows_ends_in_one_line(
    override: str, said: str, console: Console, world: Path, tmp_path: Path
) -> None:
    overrides = [*TINY_RUN, f"data_root={world}", f"output_root={tmp_path}", override]
    assert said in only_line(console(train.main, "experiment=mini/instruction_tuning", *overrides))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("num_step=3", "unknown key num_step (did you mean num_steps?); known in train: backbone, "),
        (
            "optimizer.lrr=3",
            "unknown key optimizer.lrr (did you mean lr?); known in optimizer: betas, fused, lr, weight_decay; ",
        ),
        ("trainer.strategy.x=1", "unknown key trainer.strategy; known in trainer: "),
        ("model.moe.top_k=1", "unknown key model.moe.top_k: model.moe is no group of keys here"),
        ("model=mini_studnet", "unknown choice model=mini_studnet (did you mean mini_student?); known: "),
        ("model@teacher=x", "unknown choice model=x; known: "),
        ("model@teachr=mini_teacher", "unknown config group 'model@teachr'; "),
        ("experiment=mini/x_y_z", "unknown choice experiment=mini/x_y_z; known: "),
        ("num_steps=[1", "override 'num_steps=[1' cannot be read; write key=value"),
        ("+num_steps=3", "An item is already at 'num_steps'"),
        ("data_root=${nope}", "Interpolation key 'nope' not found"),
    ],
)
def test_a_key_or_choice_that_nobody_knows_ends_in_one_line(override: str, said: str, console: Console) -> None:
    assert said in only_line(console(train.main, override))


def test_an_unknown_key_is_looked_up_in_the_chosen_files(console: Console) -> None:
    line = only_line(console(train.main, "experiment=mini/moe_tuning", "model.moe.num_expert=2"))
    fault = "unknown key model.moe.num_expert (did you mean num_experts?); known in model.moe: initialisation, kernel, "
    assert fault in line


def test_an_unknown_choice_ends_a_sweep_before_its_first_trial(console: Console) -> None:
    assert "unknown choice model=nope" in only_line(console(train.main, "-m", "model=mini_student,nope"))


def test_an_unknown_key_of_a_stage_names_the_stage(console: Console, tmp_path: Path) -> None:
    line = only_line(console(pipeline.main, f"output_root={tmp_path}", "pipeline=stamps", "common=['num_step=1']"))
    assert "stage 'teacher_tuning': unknown key num_step" in line


@pytest.mark.parametrize(("program", "key"), [(build_shards, "output"), (evaluate, "model_folder")])
def test_a_value_that_must_be_given_is_asked_for_in_one_line(program: Any, key: str, console: Console) -> None:
    assert f"{key} must be given: add {key}=<value> to the command" in only_line(console(program.main))


@pytest.mark.parametrize("which", ["sources", "validation_sources"])
def test_missing_data_leaves_no_run_in_wandb(which: str, console: Console, world: Path, tmp_path: Path) -> None:
    sources = f"data.{which}=[{{name: absent, shards: {tmp_path}/absent}}]"
    overrides = [*TINY_RUN, f"data_root={world}", f"output_root={tmp_path}", "run_name=run", "logger=default", sources]
    line = only_line(console(train.main, "experiment=mini/instruction_tuning", *overrides))
    assert f"source absent: no shards at {tmp_path}/absent" in line
    assert not (tmp_path / "run/wandb").exists()


def test_the_weights_of_another_model_end_in_one_line(
    console: Console, run: Callable[..., dict[str, Any]], world: Path, tmp_path: Path
) -> None:
    blind = run("blind", "experiment=mini/blind", "num_steps=1")
    overrides = [*TINY_RUN, f"data_root={world}", f"output_root={tmp_path}", "experiment=mini/instruction_tuning"]
    line = only_line(console(train.main, *overrides, f"model.weights={blind['model']}"))
    assert f"{blind['model']} is a checkpoint of another model" in line
    assert "change model.weights" in line


def test_a_checkpoint_of_another_model_in_the_run_folder_ends_in_one_line(
    console: Console, run: Callable[..., dict[str, Any]], world: Path, tmp_path: Path
) -> None:
    blind = run("blind", "experiment=mini/blind", "num_steps=1")
    folder = tmp_path / "mini/instruction_tuning/checkpoints"
    shutil.copytree(blind["checkpoint"], folder / Path(blind["checkpoint"]).name)
    overrides = [*TINY_RUN, f"data_root={world}", f"output_root={tmp_path}", "experiment=mini/instruction_tuning"]
    line = only_line(console(train.main, *overrides))
    assert "checkpoint of another model" in line
    assert "remove the run's checkpoints or set another run_name" in line


@pytest.mark.parametrize("program", [evaluate, analyze_routing])
def test_a_folder_without_a_model_ends_in_one_line(program: Any, console: Console, tmp_path: Path) -> None:
    line = only_line(console(program.main, f"model_folder={tmp_path}"))
    assert f"no model in {tmp_path}" in line
    assert "set model_folder" in line


def test_another_world_in_the_same_folder_ends_in_one_line(console: Console, world: Path) -> None:
    line = only_line(console(make_world.main, f"folder={world}", "num_train=5"))
    assert f"{world} holds a world with" in line
    assert "choose another folder" in line


def test_a_command_that_was_refused_may_be_mended_in_the_same_folder(
    console: Console, world: Path, tmp_path: Path
) -> None:
    overrides = [*TINY_RUN, f"data_root={world}", f"output_root={tmp_path}", "experiment=mini/connector_alignment"]
    only_line(console(train.main, *overrides, "model.connector=nope"))
    assert console(train.main, *overrides).code == 0


def test_an_error_raised_from_a_library_s_is_the_one_shown():
    error = ValueError("no language model at ./x; set model.language_model")
    error.__cause__ = OSError("shard 2 of 3 is not there")
    assert error_message(error) == "no language model at ./x; set model.language_model"


def test_a_folder_that_cannot_be_made_ends_in_one_line(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/mnt/other")

    monkeypatch.setattr(Path, "mkdir", read_only)
    ended = console(train.main, "experiment=mini/moe_tuning", "output_root=/mnt")
    assert ended.code == 2
    assert ended.errors == [
        "error: cannot write /mnt/other: Read-only file system; set output_root (or output) to a folder of yours"
    ]
