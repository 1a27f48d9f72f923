"""A miniature world of a few scenes, and the composed config of a run in it."""

from __future__ import annotations

from collections.abc import Callable
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
