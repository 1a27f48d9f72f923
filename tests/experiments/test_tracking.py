from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from omegaconf import OmegaConf

from experiments.tracking import run_id, show_figures


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    image.imsave(tmp_path / "expert_load.png", np.zeros((4, 4)))
    return tmp_path / "expert_load.png"


def run_folder(tmp_path: Path, wandb: dict[str, object] | None) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"run_name": "run", "group": None, "output_root": str(tmp_path), "logger": {"wandb": wandb}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    return folder


def test_figures_are_shown_in_the_run_they_are_of(tmp_path: Path, figure: Path) -> None:
    wandb = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "moevlm", "offline": True, "save_dir": "?"}
    folder = run_folder(tmp_path, wandb)
    before = run_id(folder)
    assert show_figures(folder, [figure])
    assert list(folder.glob(f"wandb/offline-run-*-{before}/files/media/images/figures/expert_load_*.png"))


@pytest.mark.parametrize("is_run", [True, False])
def test_a_run_that_is_not_tracked_and_a_folder_that_is_no_run_show_nothing(
    tmp_path: Path, figure: Path, is_run: bool
) -> None:
    folder = run_folder(tmp_path, None) if is_run else tmp_path / "nowhere"
    assert not show_figures(folder, [figure])
    assert not list(tmp_path.rglob("*.wandb"))
