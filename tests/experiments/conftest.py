"""A miniature world of a few scenes, and the composed config of a run in it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, open_dict

from experiments.make_world import prepare_world
from experiments.train import train

TINY_WORLD = {"seed": 0, "num_train": 24, "num_validation": 8, "num_test": 8, "image_size": 96, "vqa_per_kind": 4}
TINY_RUN = [
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "callbacks.progress=null",
    "logger=files",
    "num_steps=2",
    "global_batch_size=4",
    "micro_batch_size=2",
    "data.num_validation_samples=4",
]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Not traced for coverage, which does not count `experiments`: what else they run has tests of its own, and tracing
    doubles the time of composing configs."""
    item.add_marker("untraced")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written and sharded world."""
    folder = tmp_path_factory.mktemp("data") / "world"
    prepare_world(folder, **TINY_WORLD)
    return folder


@pytest.fixture
def compose_run(world: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose a tiny run of an experiment; further overrides win."""

    def composed(*overrides: str) -> DictConfig:
        with initialize_config_module("conf", version_base=None):
            cfg = compose("train", [*TINY_RUN, f"data_root={world}", f"output_root={tmp_path}", *overrides])
        with open_dict(cfg):
            return cfg

    return composed


@pytest.fixture
def run(compose_run: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Train a tiny run in ``tmp_path/<folder>``."""

    def trained(folder: str, *overrides: str) -> dict[str, Any]:
        return train(compose_run(*overrides), tmp_path / folder, list(overrides))

    return trained


@dataclass
class Ended:
    """How a program ended, and what stood on the terminal."""

    code: int
    output: str
    errors: list[str]  # of stderr, without progress bars


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call a program as its console script does: through Hydra and `@program`, in this process."""

    def called(main: Callable[[], None], *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        monkeypatch.setattr(sys, "gettrace", lambda: None)  # Hydra takes a coverage tracer for a debugger
        monkeypatch.setattr(logging.root, "handlers", [])  # a program sets up its own
        monkeypatch.setattr(logging.root, "level", logging.root.level)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ending:
            code = int(ending.code or 0)
        output, errors = capsys.readouterr()
        lines = [line.split("\r")[-1].strip() for line in errors.splitlines()]
        return Ended(code, output, [line for line in lines if line and "it/s" not in line and "record/s" not in line])

    return called
