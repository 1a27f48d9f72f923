"""The demo's chain and the backbones' chain, two steps a stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from safetensors import safe_open

from experiments.chain import check_chain
from experiments.instantiate import plain
from experiments.pipeline import run_pipeline
from experiments.pretrain_backbones import pretrain
from moevlm.models.pretrained import load_pretrained


@pytest.mark.timeout(900)
def test_the_demo_chain_trains_evaluates_and_explains_every_stage(tmp_path: Path) -> None:
    overrides = ["pipeline=smoke", f"output_root={tmp_path}"]
    with initialize_config_module("conf", version_base=None):
        run_pipeline(compose("pipeline", overrides))
        again = run_pipeline(compose("pipeline", overrides))  # everything is there: nothing runs twice
    summary = json.loads((tmp_path / "smoke/summary.json").read_text())
    assert summary == json.loads(json.dumps(again))
    names = [stage["name"] for stage in summary["stages"]]
    assert names[:3] == ["connector_alignment", "instruction_tuning", "moe_tuning"]
    for stage in summary["stages"]:
        assert stage["steps"] == 2
        assert stage["loss_first"] != stage["loss_last"]
        assert Path(stage["checkpoint"]).exists()
    assert {"teacher", "moe_tuning_random_routing", *names} == set(summary["eval"])
    assert {"vqa", "pope", "descriptions"} <= set(summary["eval"]["moe_tuning"])
    assert set(summary["chance"]) == {"vqa", "pope", "descriptions"}
    assert len(summary["figures"]) == 3
    assert all(Path(path).stat().st_size > 10_000 for path in summary["figures"])
    assert Path(summary["report"]).exists()


@pytest.mark.timeout(600)
def test_the_backbones_chain_exports_parts_that_load(tmp_path: Path) -> None:
    with initialize_config_module("conf", version_base=None):
        pretrain(plain(compose("pretrain_backbones", ["scale=tiny", f"output_root={tmp_path}"])))
    export = tmp_path / "backbones/export"
    assert load_pretrained(export / "teacher").num_visual_tokens == 36
    for part in ("student_vision_encoder", "student_language_model", "teacher"):
        with safe_open(export / part / "model.safetensors", framework="pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["metrics"])["steps"] == 2
        assert "commit" in metadata
        assert "global_batch_size" in metadata["config"]


def test_a_stage_that_starts_from_a_later_one_is_refused() -> None:
    stages = [{"name": "a", "experiment": "x", "start": "b"}, {"name": "b", "experiment": "x"}]
    with pytest.raises(ValueError, match="'a' starts from 'b'"):
        check_chain(stages)


def test_shipped_backbones_say_what_made_them() -> None:
    for part in ("student_vision_encoder", "student_language_model", "teacher"):
        weights = Path("backbones/mini") / part / "model.safetensors"
        assert weights.stat().st_size < 16 * 2**20
        with safe_open(weights, framework="pt") as file:
            assert {"config", "commit", "metrics"} <= set(file.metadata())
