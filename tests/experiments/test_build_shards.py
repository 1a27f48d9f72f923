from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import build_shards, verify_shards
from experiments.build_shards import count_tokens, shard_records
from moevlm.data.reader import IndexedShards
from tests.experiments.conftest import Ended
from tests.samples import llava_record, small_processor, write_llava

Console = Callable[..., Ended]
ROOT = Path(__file__).parents[2]


def test_the_program_writes_shards_and_says_what_it_rejected(tmp_path: Path) -> None:
    write_llava(tmp_path, [*(llava_record(number) for number in range(6)), {"id": "bad"}])
    arguments = ["json=records.json", "image_folder=images", "output=out", "max_rejected_fraction=0.5", "source=test"]
    command = [sys.executable, "-m", "experiments.build_shards", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 samples in 1 shards" in done.stdout
    assert "1 records rejected (no_turns 1); names in out/rejected.jsonl" in done.stdout
    assert "100%" in done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"] == "test"
    assert len(IndexedShards(tmp_path / "out")) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"records.json", "images", "out"}


def test_the_program_ends_in_one_clear_line_past_the_limit(console: Console, tmp_path: Path) -> None:
    json_file, images = write_llava(tmp_path, [llava_record(0), llava_record(1)])
    (images / "0.png").unlink()
    ended = console(build_shards.main, f"json={json_file}", f"image_folder={images}", f"output={tmp_path}/out")
    assert ended.code == 2
    (line,) = [line for line in ended.errors if not line.startswith("WARNING: ")]
    assert line.startswith("error: 1 of 2 records were rejected (missing_image 1)")
    assert "raise max_rejected_fraction" in line


def test_other_programs_shard_records_through_the_same_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file, images = write_llava(tmp_path, [llava_record(0)])
    manifest = shard_records(json_file, images, tmp_path / "out", source="made up", licence="CC0-1.0")
    assert manifest["num_samples"] == 1
    assert "1 samples in 1 shards" in capsys.readouterr().out


def test_shards_are_verified_by_a_program_and_tokens_counted_for_the_manifest(console: Console, tmp_path: Path) -> None:
    json_file, images = write_llava(tmp_path, [llava_record(number) for number in range(6)])
    manifest = shard_records(json_file, images, tmp_path / "out")
    count_tokens(tmp_path / "out", small_processor(), manifest)
    stored = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (statistics,) = stored["text_tokens"].values()
    assert 0 < statistics["min"] <= statistics["median"] <= statistics["p95"] <= statistics["max"]
    assert stored["text"]["turns"] == 12
    whole = console(verify_shards.main, f"folder={tmp_path}/out")
    assert whole.code == 0
    assert "out: no fault" in whole.output
    (tmp_path / "out" / "000000.tar").write_bytes(b"x" * 9)
    broken = console(verify_shards.main, f"folder={tmp_path}/out")
    assert broken.code == 2
    assert any("000000.tar: size or checksum is not the manifest's" in line for line in broken.errors)
