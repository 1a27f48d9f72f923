"""Preference pairs: a faithful description against one that tells what the prior expects, else alike."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moevlm.world import vocabulary as v
from moevlm.world.cooccurrence import CoOccurrence
from moevlm.world.ground_truth import categories
from moevlm.world.scenes import Scene, SceneObject
from moevlm.world.texts.descriptions import describe_objects, relation_sentences

# swapped: an object is replaced by an absent, co-occurring one elsewhere; added: such an object is told on top, where
# the faithful text tells true relations; attribute: colour, texture or size of one object is wrong.
FLAW_SHARES = {"swapped": 0.45, "added": 0.35, "attribute": 0.2}
PLAUSIBLE_WEIGHTS = (3, 2, 1)  # of the categories that co-occur most with what is there, the most plausible first


@dataclass(frozen=True)
class DescriptionPair:
    """Two descriptions of one scene, of about the same length."""

    chosen: str
    rejected: str
    flaw: str  # a key of FLAW_SHARES
    hallucinated: str | None  # the category told of that is not there; None for the flaw ``attribute``


def draw_description_pair(scene: Scene, prior: CoOccurrence, rng: random.Random) -> DescriptionPair:
    """Draw a pair; ``prior`` holds the statistics that say what is plausible."""
    flaw = rng.choices(list(FLAW_SHARES), list(FLAW_SHARES.values()))[0]
    if flaw == "added" and len(scene.objects) == v.MAX_OBJECTS:
        flaw = "swapped"
    wording = rng.random()
    chosen = describe_objects(scene.objects, random.Random(wording))
    if flaw == "attribute":
        index = rng.randrange(len(scene.objects))
        wrong = _replace_at(scene.objects, index, _with_wrong_attribute(scene.objects[index], rng))
        return DescriptionPair(chosen, describe_objects(wrong, random.Random(wording)), flaw, None)
    absent = [c for c in v.CATEGORIES if c not in categories(scene)]
    plausible = prior.most_cooccurring(categories(scene), absent)[: len(PLAUSIBLE_WEIGHTS)]
    category = rng.choices(plausible, PLAUSIBLE_WEIGHTS)[0]
    imagined = _imagine(scene, category, rng)
    if flaw == "swapped":
        told = _replace_at(scene.objects, rng.randrange(len(scene.objects)), imagined)
    else:
        told = (*scene.objects, imagined)
        chosen = " ".join([chosen, *relation_sentences(scene, rng, rng.randint(1, 2))])
    return DescriptionPair(chosen, describe_objects(told, random.Random(wording)), flaw, category)


def _imagine(scene: Scene, category: str, rng: random.Random) -> SceneObject:
    """An object that is not there, in a free cell, with attributes drawn as those of real ones."""
    taken = {(o.row, o.column) for o in scene.objects}
    row, column = rng.choice([(r, c) for r in range(3) for c in range(3) if (r, c) not in taken])
    size = rng.choice(v.SIZES)
    labelled = size == "large" and rng.random() < v.LABEL_PROBABILITY
    return SceneObject(
        category=category, colour=rng.choice(v.COLOURS), size=size, texture=rng.choice(v.TEXTURES),
        x=(column + 0.5) / 3, y=(row + 0.5) / 3, label=rng.choice(v.LABELS) if labelled else None,
    )  # fmt: skip


def _with_wrong_attribute(item: SceneObject, rng: random.Random) -> SceneObject:
    choices = {"colour": v.COLOURS, "texture": v.TEXTURES}
    if item.label is None:
        choices["size"] = v.SIZES
    attribute = rng.choice(list(choices))
    changed: dict[str, Any] = {attribute: rng.choice([x for x in choices[attribute] if x != getattr(item, attribute)])}
    return replace(item, **changed)


def _replace_at(objects: Sequence[SceneObject], index: int, item: SceneObject) -> tuple[SceneObject, ...]:
    return (*objects[:index], item, *objects[index + 1 :])
