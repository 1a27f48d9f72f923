"""What is true of a scene and what a text claims of one: the two sides of every faithfulness metric."""

import re
from collections.abc import Iterable

import numpy as np
from PIL import Image

from moevlm.world import vocabulary as v
from moevlm.world.scenes import Scene, SceneObject
from moevlm.world.shapes import shape_mask

# Class names of each attribute; the class id of a name is 1 + its index, 0 means nothing there (or no label).
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "category": v.CATEGORIES,
    "colour": v.COLOURS,
    "size": v.SIZES,
    "texture": v.TEXTURES,
    "label": v.LABELS,
}
NUM_CLASSES = {attribute: 1 + len(names) for attribute, names in ATTRIBUTES.items()}
CLASS_IDS = {a: {name: 1 + i for i, name in enumerate(names)} for a, names in ATTRIBUTES.items()}

MIN_COVERAGE = 0.2  # share of a patch that an object must cover to own it
CELLS_PER_PATCH = 16  # resolution, along a side of a patch, at which coverage is measured

# Other words for a category; models may say them even where the world's own texts do not.
SYNONYMS = {"crescent": "moon", "crescents": "moon", "disc": "circle", "discs": "circle", "rhombus": "diamond"}

_NAMES = {name: c for c in v.CATEGORIES for name in (c, v.PLURALS[c])} | SYNONYMS
_NAME_PATTERN = re.compile(r"\b(" + "|".join(sorted(_NAMES, key=len, reverse=True)) + r")\b", re.IGNORECASE)


def categories(scene: Scene) -> list[str]:
    """Categories that are there, each once, in the order of `vocabulary.CATEGORIES`."""
    return _ordered(o.category for o in scene.objects)


def mentioned_categories(text: str) -> list[str]:
    """Categories named in a text, singular or plural or by a synonym, each once, in class order.

    Whole words only (``across`` names no cross). A negated mention counts too, so faithful texts must not contain any.
    CHAIR (arXiv:1809.02156) of a text is the share of these that `categories` of its scene does not hold.
    """
    return _ordered(_NAMES[name.lower()] for name in _NAME_PATTERN.findall(text))


def patch_labels(scene: Scene, grid: int) -> dict[str, np.ndarray]:
    """Class ids of the object in each patch, for every attribute of `ATTRIBUTES`.

    A patch belongs to the object whose silhouette covers most of it, if that is at least `MIN_COVERAGE` of the patch;
    an object that wins no patch in this way gets the one that it covers most.

    Args:
        scene: ground truth.
        grid: patches along each side of the image, e.g. 6 for patches of 16 pixels in 96.

    Returns:
        One (grid, grid) int64 array per attribute, row 0 at the top; 0 is nothing there, or for ``label`` no label.

    Raises:
        ValueError: grid is less than 1.
    """
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    coverage = np.stack([np.full((grid, grid), MIN_COVERAGE), *(_coverage(item, grid) for item in scene.objects)])
    owner = coverage.argmax(axis=0)  # 0 is nobody, i + 1 the i-th object
    for index in range(1, len(coverage)):
        if not (owner == index).any():
            owner[np.unravel_index(coverage[index].argmax(), owner.shape)] = index
    labels = {}
    for attribute, ids in CLASS_IDS.items():
        names = [getattr(item, attribute) for item in scene.objects]
        labels[attribute] = np.array([0, *(0 if name is None else ids[name] for name in names)], dtype=np.int64)[owner]
    return labels


def _coverage(item: SceneObject, grid: int) -> np.ndarray:
    """Share of each patch that the object's silhouette covers, (grid, grid)."""
    size = grid * CELLS_PER_PATCH
    width = max(round(v.SIZE_FRACTIONS[item.size] * size), 1)
    canvas = Image.new("L", (size, size), 0)
    canvas.paste(shape_mask(item.category, width), (round(item.x * size - width / 2), round(item.y * size - width / 2)))
    return np.asarray(canvas.reduce(CELLS_PER_PATCH), dtype=np.float64) / 255


def _ordered(names: Iterable[str]) -> list[str]:
    found = set(names)
    return [c for c in v.CATEGORIES if c in found]
