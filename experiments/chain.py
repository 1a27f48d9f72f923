"""A chain of stages: runs of `experiments.train`, each model a later one's start, and programs that make their data."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig

from experiments.chain_programs import PROGRAMS, run_program
from experiments.composition_errors import explain
from experiments.train import train


def run_stages(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Train every stage in its own run folder, one after another; finished ones are passed over.

    Returns:
        Each stage's ``result.json``, by name.
    """
    check_chain(settings["stages"])
    root = Path(settings["output_root"]) / settings["name"]
    results = {}
    for number, stage in enumerate(settings["stages"], start=1):
        print(f"[{number}/{len(settings['stages'])}] {stage['name']}", flush=True)
        results[stage["name"]] = run_stage(stage, settings, root / stage["name"])
        gc.collect()
    return results


def run_stage(stage: dict[str, Any], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one stage whose needs are done; called while a Hydra is open.

    Returns:
        Its ``result.json``.
    """
    program = stage.get("program", "train")
    overrides = stage_overrides(settings, stage) if program in ("train", "cache_teacher") else []
    if program != "train":
        return run_program(stage, settings, folder, overrides, compose_stage)
    return train(compose_stage(stage["name"], "train", overrides), folder, overrides)


def compose_stage(name: str, config_name: str, overrides: list[str]) -> DictConfig:
    """The config of one stage; called while the pipeline's own Hydra is open.

    Raises:
        ValueError: an override that the stage's config does not know.
    """
    try:
        return hydra.compose(config_name, overrides)
    except (HydraException, CompactHydraException, OSError) as error:
        raise ValueError(f"stage {name!r}: {explain(error, config_name, overrides) or error}") from None


def check_chain(stages: list[dict[str, Any]]) -> None:
    """What a stage needs must stand before it, and names must differ."""
    seen: list[str] = []
    for stage in stages:
        if stage["name"] in seen:
            raise ValueError(f"two stages are called {stage['name']!r}; rename one in pipeline.stages")
        if stage.get("start") is not None and stage["start"] not in seen:
            raise ValueError(
                f"stage {stage['name']!r} starts from {stage['start']!r}, which is none of the stages before it: {seen}"
            )
        for name in stage.get("after", []):
            if name not in seen:
                raise ValueError(
                    f"stage {stage['name']!r} runs after {name!r}, which is none of the stages before it: {seen}"
                )
        if stage.get("program", "train") not in PROGRAMS:
            raise ValueError(
                f"stage {stage['name']!r} has program {stage['program']!r}; known: {', '.join(PROGRAMS)}; "
                "set pipeline.stages"
            )
        seen.append(stage["name"])


def stage_overrides(settings: dict[str, Any], stage: dict[str, Any]) -> list[str]:
    """The command line of one stage, as a person would type it."""
    root = f"{settings['output_root']}/{settings['name']}"
    overrides = [
        f"experiment={stage['experiment']}",
        f"run_name={settings['name']}/{stage['name']}",
        f"group={settings['name']}",
        f"seed={settings['seed']}",
    ]
    overrides += [f"output_root={settings['output_root']}", f"data_root={settings['data_root']}", *settings["common"]]
    if stage.get("start") is not None:
        overrides.append(f"model.weights={root}/{stage['start']}/model")
    overrides += stage.get("overrides", [])
    if settings["num_steps"] is not None:
        overrides.append(f"num_steps={settings['num_steps']}")
    return overrides


def needs_of(stage: dict[str, Any], settings: dict[str, Any]) -> set[str]:
    """The stages that must be done before `stage`: its start, those of its ``after``, and those whose folders its
    overrides name."""
    root = f"{settings['output_root']}/{settings['name']}"
    text = "\n".join(stage.get("overrides", []))
    named = {other["name"] for other in settings["stages"] if f"{root}/{other['name']}/" in text}
    started = {stage["start"]} if stage.get("start") is not None else set()
    return (named | started | set(stage.get("after", []))) - {stage["name"]}
