"""Scenes: a few objects on a background, drawn with a biased co-occurrence, and split by their own content.

How a scene is drawn (ours; the biases are the constants of `vocabulary`):

* the number of objects is uniform on 2..5, each in a cell of its own of a 3 x 3 grid, jittered inside the cell;
* the first category is drawn by popularity; each further one is with probability 0.5 the missing partner of one
  already there, with probability 0.2 a repeat of one already there, else again a draw by popularity;
* colour, size and texture are uniform and independent of the category, so that no attribute can be guessed.

Hence P(moon | star) is far above P(moon): a model that trusts its language more than its eyes hallucinates moons.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from moevlm.world import vocabulary as v

SPLITS = ("train", "validation", "test")
SPLIT_PERCENTAGES = {"train": 80, "validation": 10, "test": 10}


@dataclass(frozen=True)
class SceneObject:
    """One object; ``x`` and ``y`` are its centre as fractions of the image, from the top left."""

    category: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    label: str | None = None

    def __post_init__(self) -> None:
        _require("category", self.category, v.CATEGORIES)
        _require("colour", self.colour, v.COLOURS)
        _require("size", self.size, v.SIZES)
        _require("texture", self.texture, v.TEXTURES)
        if self.label is not None:
            _require("label", self.label, v.LABELS)
            if self.size != "large":
                raise ValueError(f"only large objects are legible with a label, got {self.size} with {self.label!r}")
        if not (0.0 <= self.x <= 1.0 and 0.0 <= self.y <= 1.0):
            raise ValueError(f"an object's centre must lie in [0, 1] x [0, 1], got ({self.x}, {self.y})")

    @property
    def row(self) -> int:
        """Row of the 3 x 3 grid that holds the centre, 0 at the top."""
        return min(int(self.y * 3), 2)

    @property
    def column(self) -> int:
        """Column of the 3 x 3 grid that holds the centre, 0 at the left."""
        return min(int(self.x * 3), 2)

    @property
    def place(self) -> str:
        """Name of the cell that holds the centre, e.g. ``top left``."""
        return v.PLACES[self.row][self.column]


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a background; ``background_seed`` fixes its tint and noise."""

    background: str
    background_seed: int
    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        _require("background", self.background, v.BACKGROUNDS)
        if not v.MIN_OBJECTS <= len(self.objects) <= v.MAX_OBJECTS:
            raise ValueError(f"a scene has {v.MIN_OBJECTS} to {v.MAX_OBJECTS} objects, got {len(self.objects)}")

    @cached_property
    def scene_id(self) -> str:
        """Name of the scene: a hash of everything that can be seen."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def content_hash(self) -> int:
        """Hash of everything that can be said: objects, attributes, labels and places, in any order.

        Neither the background nor the jitter inside a cell changes it, so two scenes of one description are one here.
        """
        said = sorted((o.category, o.colour, o.size, o.texture, o.place, o.label or "") for o in self.objects)
        return int.from_bytes(hashlib.sha256(json.dumps(said).encode()).digest()[:8], "big")


def sample_scene(seed: int | str) -> Scene:
    """Draw the scene of a seed; the module's docstring says from which distribution."""
    rng = random.Random(f"scene/{seed}")
    categories = _sample_categories(rng, rng.randint(v.MIN_OBJECTS, v.MAX_OBJECTS))
    cells = rng.sample(range(9), len(categories))
    labels = rng.sample(v.LABELS, len(categories))
    objects = []
    for cell, category, label in sorted(zip(cells, categories, labels, strict=True)):
        size = "large" if rng.random() < v.LARGE_PROBABILITY else "small"
        slack = 1 / 3 - v.SIZE_FRACTIONS[size] - 0.005  # what the object leaves free of its cell, less a hair's gap
        objects.append(
            SceneObject(
                category=category,
                colour=rng.choice(v.COLOURS),
                size=size,
                texture=rng.choice(v.TEXTURES),
                x=round((cell % 3 + 0.5) / 3 + (rng.random() - 0.5) * slack, 4),
                y=round((cell // 3 + 0.5) / 3 + (rng.random() - 0.5) * slack, 4),
                label=label if size == "large" and rng.random() < v.LABEL_PROBABILITY else None,
            )
        )
    return Scene(rng.choice(v.BACKGROUNDS), rng.randrange(2**16), tuple(objects))


def split_of(scene: Scene) -> str:
    """Split of a scene: a pure function of what can be said of it, 80 / 10 / 10 by hash buckets.

    Two scenes of the same description fall into the same split whatever seeds drew them.
    """
    bucket = scene.content_hash % 100
    for split in SPLITS:
        bucket -= SPLIT_PERCENTAGES[split]
        if bucket < 0:
            return split
    raise AssertionError("the split percentages do not add up to 100")


def iterate_scenes(split: str, seed: int, count: int) -> Iterator[Scene]:
    """Yield ``count`` scenes of a split, no two of the same description; a longer count only appends.

    Raises:
        ValueError: unknown split or negative count.
    """
    _require("split", split, SPLITS)
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    return _iterate_scenes(split, seed, count)


def _iterate_scenes(split: str, seed: int, count: int) -> Iterator[Scene]:
    seen: set[int] = set()
    for index in itertools.count():
        if len(seen) == count:
            return
        scene = sample_scene(f"{seed}/{index}")
        if split_of(scene) == split and scene.content_hash not in seen:
            seen.add(scene.content_hash)
            yield scene


def scene_to_record(scene: Scene) -> dict[str, Any]:
    """Exact ground truth of a scene as plain JSON values; `scene_from_record` reads it back."""
    return {"scene": scene.scene_id, "split": split_of(scene), **asdict(scene)}


def scene_from_record(record: Mapping[str, Any]) -> Scene:
    """Read a line of ``scenes.jsonl``.

    Raises:
        ValueError: a field is missing or unknown, or the content does not hash to the scene's name.
    """
    try:
        objects = tuple(SceneObject(**fields) for fields in record["objects"])
        scene = Scene(record["background"], record["background_seed"], objects)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a scene record, {error}: {str(record)[:120]}") from error
    if record.get("scene", scene.scene_id) != scene.scene_id:
        raise ValueError(f"scene {record['scene']} hashes to {scene.scene_id}: its record was edited; write it again")
    return scene


def _sample_categories(rng: random.Random, count: int) -> list[str]:
    weights = list(v.POPULARITY.values())
    chosen = rng.choices(v.CATEGORIES, weights)
    while len(chosen) < count:
        missing = [v.PARTNERS[c] for c in chosen if v.PARTNERS[c] not in chosen]
        fate = rng.random()
        if fate < v.PARTNER_PROBABILITY and missing:
            chosen.append(rng.choice(missing))
        elif v.PARTNER_PROBABILITY <= fate < v.PARTNER_PROBABILITY + v.REPEAT_PROBABILITY:
            chosen.append(rng.choice(chosen))
        else:
            chosen += rng.choices(v.CATEGORIES, weights)
    return chosen


def _require(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
