"""Every config composes, says only what the entry config knows, and stays short."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

import conf
from experiments.chain import check_chain
from experiments.chain_programs import STARTS

CONF = Path(conf.__file__).parent
EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix("")) for path in CONF.glob("experiment/*/*.yaml")
)
PIPELINES = sorted(path.stem for path in CONF.glob("pipeline/*.yaml"))


@functools.cache
def compose_plain(config_name: str, *overrides: str) -> dict:
    with initialize_config_module("conf", version_base=None):
        cfg = compose(config_name, list(overrides))
    return OmegaConf.to_container(cfg, resolve=False)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_with_the_keys_of_the_entry_config(name: str) -> None:
    known = set(compose_plain("train"))
    composed = compose_plain("train", f"experiment={name}")
    assert set(composed) == known
    assert composed["run_name"].removesuffix("/${backbone}") == name


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_names_known_experiments_and_keys(name: str) -> None:
    composed = compose_plain("pipeline", f"pipeline={name}")
    assert set(composed) == set(compose_plain("pipeline"))
    assert {stage["experiment"] for stage in composed["stages"] if "experiment" in stage} <= set(EXPERIMENTS)
    assert all("experiment" in stage or stage.get("program") in STARTS for stage in composed["stages"])
    check_chain(composed["stages"])


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_scale_of_the_backbones_composes(scale: str) -> None:
    composed = compose_plain("pretrain_backbones", f"scale={scale}")
    assert set(composed["export"].values()) <= {stage["name"] for stage in composed["stages"]}


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_no_config_is_longer_than_a_page(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40


def test_an_unknown_experiment_is_refused_by_name() -> None:
    with pytest.raises(MissingConfigException, match="experiment/mini/nope"):
        compose_plain("train", "experiment=mini/nope")


def test_an_unknown_choice_lists_the_known_ones() -> None:
    with pytest.raises(MissingConfigException, match=r"(?s)nope.*mini_student_sparse"):
        compose_plain("train", "model=nope")


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigCompositionException, match="num_step"):
        compose_plain("train", "num_step=3")
