"""What a run folder says about the code that wrote it, and who may write."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import pytest

from experiments import run_folder
from experiments.run_folder import one_at_a_time


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


def test_what_one_process_at_a_time_does_is_not_interleaved(tmp_path: Path) -> None:
    seen: list[str] = []

    def enter(name: str) -> None:
        with one_at_a_time(tmp_path / "folder/.lock"):
            seen.append(name)
            time.sleep(0.05)
            seen.append(name)

    threads = [threading.Thread(target=enter, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0::2] == seen[1::2]
    assert sorted(seen[0::2]) == ["a", "b", "c"]
