"""What a run folder says about the code that wrote it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from experiments import run_folder


@pytest.mark.parametrize("folder", [".", "copies/of_the_code"])
def test_a_copy_inside_another_checkout_does_not_take_its_commit(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / folder
    (root / "experiments").mkdir(parents=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(run_folder, "__file__", str(root / "experiments" / "run_folder.py"))
    monkeypatch.setenv("MOEVLM_COMMIT", "told")
    assert (run_folder.commit() == "told") == (folder != ".")
