"""Writes a world to a folder: images, exact ground truth, and every record file, in the ordinary LLaVA format.

* ``images/<split>/<scene_id>.png``, ``scenes.jsonl`` (ground truth, a scene a line), ``world.json`` (summary)
* train and validation: ``captions_<split>.json``, ``instructions_<split>.json``, ``preferences_<split>.json``
* validation and test: ``vqa_<split>.json``
* test: ``pope_{random,popular,adversarial}_test.json``, ``descriptions_test.json``
"""

import functools
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from moevlm.world import vocabulary as v
from moevlm.world.cooccurrence import CoOccurrence, count_cooccurrence
from moevlm.world.evaluation_sets import description_records, probe_records, vqa_records
from moevlm.world.records import Record, count_by_kind, majority_accuracy
from moevlm.world.rendering import MIN_IMAGE_SIZE, render
from moevlm.world.scenes import Scene, iterate_scenes, scene_from_record, scene_to_record, split_of
from moevlm.world.texts.probes import NEGATIVES
from moevlm.world.training_sets import InstructionMix, caption_records, instruction_records, preference_records

WORLD_VERSION = 2  # raise it when the same arguments give other bytes
IMAGE_OPTIONS: dict[str, dict[str, Any]] = {"png": {"compress_level": 3}, "jpg": {"quality": 95, "subsampling": 0}}

Progress = Callable[[str, int, int], None]  # (file or split, done, total)


def write_world(
    folder: str | Path, *, seed: int, num_train: int, num_validation: int, num_test: int, image_size: int = 96,
    image_format: str = "png", vqa_per_kind: int = 150, mix: InstructionMix | None = None,
    num_workers: int = 1, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Draw scenes and write everything about them; the same arguments give the same bytes.

    The folder appears by rename once it is complete, so a killed run leaves no half of a world under its name.

    Args:
        folder: must not exist yet, or be empty.
        seed: of scenes and texts; splits of two worlds never share a scene whatever their seeds.
        num_train: scenes of the train split; num_validation and num_test likewise.
        image_size: width of the square images in pixels.
        image_format: png or jpg.
        vqa_per_kind: test questions of each kind (seven visual kinds and text); a quarter of it for validation.
        mix: instruction records a scene gets.
        num_workers: processes that draw images.
        progress: called as images and files are written.

    Returns:
        The summary, also in ``world.json``.

    Raises:
        ValueError: a bad argument, or a folder that is not empty.
    """
    target = Path(folder)
    counts = {"train": num_train, "validation": num_validation, "test": num_test}
    _check_arguments(target, counts, image_size, image_format, vqa_per_kind)
    report: Progress = progress or (lambda name, done, total: None)
    scenes = {split: list(iterate_scenes(split, seed, count)) for split, count in counts.items()}
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    for split in scenes:
        images = partial / "images" / split
        images.mkdir(parents=True)
        draw = functools.partial(_write_image, folder=images, size=image_size, image_format=image_format)
        for done, _ in enumerate(_map(draw, scenes[split], num_workers), start=1):
            report(f"{split} images", done, counts[split])
    _write_lines(partial / "scenes.jsonl", (scene_to_record(s) for split in scenes for s in scenes[split]))
    prior = count_cooccurrence(scenes["train"])
    summary: dict[str, Any] = {"version": WORLD_VERSION, "seed": seed, "image_size": image_size, "num_scenes": counts}
    summary |= {"files": {}, "records_by_kind": {}}
    total = 6 + 2 + len(NEGATIVES) + 1
    for name, records in _record_files(scenes, seed, image_format, vqa_per_kind, mix, prior):
        (partial / f"{name}.json").write_text(json.dumps(records, indent=0), encoding="utf-8")
        summary["files"][f"{name}.json"] = len(records)
        summary["records_by_kind"][name] = count_by_kind(records)
        if name == "vqa_test":
            summary["majority_accuracy"] = majority_accuracy(records)
        report("records", len(summary["files"]), total)
    summary |= _class_summary(prior)
    (partial / "world.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    partial.replace(target)
    return summary


def read_scenes(folder: str | Path) -> list[Scene]:
    """Scenes of a written world.

    Raises:
        ValueError: there is no ``scenes.jsonl``, or one of its lines is not a scene.
    """
    path = Path(folder) / "scenes.jsonl"
    if not path.is_file():
        raise ValueError(f"no world in {folder}: {path.name} is missing; write one with write_world")
    return [scene_from_record(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _record_files(
    scenes: dict[str, list[Scene]], seed: int, image_format: str, vqa_per_kind: int, mix: InstructionMix | None,
    prior: CoOccurrence,
) -> Iterator[tuple[str, list[Record]]]:  # fmt: skip
    def image_path(scene: Scene) -> str:
        return f"{split_of(scene)}/{scene.scene_id}.{image_format}"

    for split in ("train", "validation"):
        yield f"captions_{split}", caption_records(scenes[split], seed, image_path)
        yield f"instructions_{split}", instruction_records(scenes[split], seed, image_path, mix)
        yield f"preferences_{split}", preference_records(scenes[split], seed, image_path, prior)
    for split, per_kind in (("validation", max(vqa_per_kind // 4, 1)), ("test", vqa_per_kind)):
        yield f"vqa_{split}", vqa_records(scenes[split], seed, image_path, questions_per_kind=per_kind)
    for negatives in NEGATIVES:
        probes = probe_records(scenes["test"], seed, image_path, negatives=negatives, prior=prior)
        yield f"pope_{negatives}_test", probes
    yield "descriptions_test", description_records(scenes["test"], seed, image_path)


def _map(draw: Callable[[Scene], None], scenes: Sequence[Scene], num_workers: int) -> Iterator[None]:
    if num_workers <= 1:
        yield from map(draw, scenes)
        return
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with ProcessPoolExecutor(num_workers, context) as pool:
        yield from pool.map(draw, scenes, chunksize=64)


def _write_image(scene: Scene, *, folder: Path, size: int, image_format: str) -> None:
    render(scene, size).save(folder / f"{scene.scene_id}.{image_format}", **IMAGE_OPTIONS[image_format])


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _class_summary(prior: CoOccurrence) -> dict[str, Any]:
    names = {"categories": v.CATEGORIES, "colours": v.COLOURS, "sizes": v.SIZES}
    names |= {"textures": v.TEXTURES, "labels": v.LABELS}
    marginal = dict(zip(v.CATEGORIES, prior.marginal.round(4).tolist(), strict=True))
    given = {
        row: dict(zip(v.CATEGORIES, values, strict=True))
        for row, values in zip(v.CATEGORIES, prior.conditional.round(4).tolist(), strict=True)
    }
    return {"classes": names, "cooccurrence": {"marginal": marginal, "conditional": given}}


def _check_arguments(
    target: Path, counts: dict[str, int], image_size: int, image_format: str, vqa_per_kind: int
) -> None:
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"num_{split} must be at least 1, got {count}")
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {MIN_IMAGE_SIZE}, got {image_size}")
    if image_format not in IMAGE_OPTIONS:
        raise ValueError(f"unknown image_format {image_format!r}; known: {', '.join(IMAGE_OPTIONS)}")
    if vqa_per_kind < 1:
        raise ValueError(f"vqa_per_kind must be at least 1, got {vqa_per_kind}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not an empty folder; remove it or choose another")
