"""What is true of a scene and what a text claims of one: the two sides of every faithfulness metric."""

import re
from collections.abc import Iterable

import numpy as np

from moevlm.world import vocabulary as v
from moevlm.world.scenes import Scene, SceneObject

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

    A patch belongs to the object whose bounding square covers at least half of it; and the patch under an object's
    centre belongs to that object, however small it is. Objects do not overlap, so no patch has two owners.

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
    labels = {attribute: np.zeros((grid, grid), dtype=np.int64) for attribute in ATTRIBUTES}
    for item in scene.objects:
        owned = np.outer(_coverage(item.y, item, grid), _coverage(item.x, item, grid)) >= 0.5
        owned[min(int(item.y * grid), grid - 1), min(int(item.x * grid), grid - 1)] = True
        for attribute, ids in CLASS_IDS.items():
            name = getattr(item, attribute)
            labels[attribute][owned] = 0 if name is None else ids[name]
    return labels


def _coverage(centre: float, item: SceneObject, grid: int) -> np.ndarray:
    """Share of each patch, along one axis, that the object's extent covers."""
    half = v.SIZE_FRACTIONS[item.size] / 2
    edges = np.arange(grid + 1) / grid
    overlap = np.minimum(edges[1:], centre + half) - np.maximum(edges[:-1], centre - half)
    return overlap.clip(min=0.0) * grid


def _ordered(names: Iterable[str]) -> list[str]:
    found = set(names)
    return [c for c in v.CATEGORIES if c in found]
