"""Preference pairs: a faithful description against one that tells what the prior expects, else alike."""

import random
from dataclasses import dataclass, replace
from typing import Any

from moevlm.world import vocabulary as v
from moevlm.world.cooccurrence import CoOccurrence
from moevlm.world.ground_truth import categories
from moevlm.world.scenes import Scene, SceneObject
from moevlm.world.texts.descriptions import describe_objects, relation_sentences

# swapped: an object is replaced by an absent, co-occurring one elsewhere; mistaken: one is told as an absent category,
# all else being true; attribute: colour, texture or size of one is wrong. Both sides of a pair have as many sentences,
# in the same wordings, or a policy learns a length instead.
FLAW_SHARES = {"swapped": 0.4, "mistaken": 0.4, "attribute": 0.2}
RELATIONS_FRACTION = 0.35  # of the pairs that end, on both sides, in sentences on where objects are to each other
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
    index, hallucinated = rng.randrange(len(scene.objects)), None
    absent = [c for c in v.CATEGORIES if c not in categories(scene)]
    if flaw == "attribute":
        wrong = _with_wrong_attribute(scene.objects[index], rng)
    elif flaw == "mistaken":
        hallucinated = rng.choice(absent)
        wrong = replace(scene.objects[index], category=hallucinated)
    else:
        plausible = prior.most_cooccurring(categories(scene), absent)[: len(PLAUSIBLE_WEIGHTS)]
        hallucinated = rng.choices(plausible, PLAUSIBLE_WEIGHTS)[0]
        wrong = _imagine(scene, hallucinated, rng)
    wording = rng.random()
    true_of_both = [o for number, o in enumerate(scene.objects) if number != index]
    count = rng.randint(1, 2) if rng.random() < RELATIONS_FRACTION else 0
    relations = relation_sentences(scene, rng, count, among=true_of_both)
    sides = [scene.objects, (*scene.objects[:index], wrong, *scene.objects[index + 1 :])]
    chosen, rejected = (" ".join([describe_objects(o, random.Random(wording)), *relations]) for o in sides)
    return DescriptionPair(chosen, rejected, flaw, hallucinated)


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
