"""Draw the miniature world: images, LLaVA records, exact ground truth, and shards of all training records.

python -m experiments.make_world folder=outputs/world num_train=4000
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from experiments.build_shards import shard_records
from experiments.instantiate import plain
from experiments.program import program
from moevlm.data.image_folders import find_image_folder
from moevlm.data.records import load_json_records
from moevlm.world.writer import write_world


def prepare_world(folder: Path, *, num_workers: int = 1, **settings: Any) -> dict[str, Any]:
    """Write a world and its shards, or say that they are there already.

    Args:
        num_workers: processes that draw images and write shards; the world is the same.
        settings: arguments of `moevlm.world.writer.write_world`.

    Returns:
        The world's summary.

    Raises:
        ValueError: the folder holds a world with other settings.
    """
    stored = folder / "world_settings.json"
    if stored.exists():
        before = json.loads(stored.read_text())
        if before != settings:
            raise ValueError(f"{folder} holds a world with {before}, asked for {settings}; choose another folder")
    else:
        with tqdm(desc="world", unit="image") as bar:
            write_world(
                folder,
                **settings,
                num_workers=num_workers,
                progress=lambda name, done, total: _advance(bar, name, done, total),
            )
    shard_training_records(folder, source="miniature world", num_workers=num_workers)
    stored.write_text(json.dumps(settings))
    print(f"world in {folder}")
    summary: dict[str, Any] = json.loads((folder / "world.json").read_text())
    return summary


def shard_training_records(folder: Path, *, source: str, licence: str = "Apache-2.0", num_workers: int = 1) -> None:
    """Shards of every training and validation record file of a folder, in ``shards/<name>``; finished ones stay."""
    options: dict[str, Any] = {"source": source, "licence": licence, "num_workers": num_workers, "overwrite": True}
    for family in ("captions", "instructions", "preferences"):
        for split in ("train", "validation"):
            records, target = folder / f"{family}_{split}.json", folder / "shards" / f"{family}_{split}"
            if records.exists() and not (target / "manifest.json").exists():
                images = find_image_folder(folder, load_json_records(records))
                shard_records(records, images, target, **options)


def _advance(bar: tqdm, name: str, done: int, total: int) -> None:
    bar.set_postfix_str(f"{name} {done}/{total}", refresh=False)
    bar.update()


@program("make_world")
def main(cfg: DictConfig) -> None:
    settings = plain(cfg)
    prepare_world(Path(settings.pop("folder")), **settings)


if __name__ == "__main__":
    main()
