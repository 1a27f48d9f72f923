"""Captions and long descriptions: faithful to the objects they are given."""

import random
from collections import Counter
from collections.abc import Sequence

from moevlm.world import vocabulary as v
from moevlm.world.scenes import Scene, SceneObject
from moevlm.world.texts.phrasings import OBJECT_REQUESTS
from moevlm.world.texts.relation_questions import directions_between
from moevlm.world.texts.wording import (
    NUMBER_WORDS,
    PLACE_PHRASES,
    join_list,
    noun_phrase,
    references,
    sentence_case,
    with_article,
)

PLURAL_TEMPLATES = ("{list}.", "An image of {list}.", "This image shows {list}.", "A picture of {list}.")
CAPTION_TEMPLATES = (*PLURAL_TEMPLATES, "There is {list}.")

OPENINGS = (
    "The image shows {number} objects.", "There are {number} objects in the image.",
    "This picture has {number} objects.", "I can see {number} objects.", "In total there are {number} objects.",
)  # fmt: skip

OBJECT_ANSWERS = ("It is {a_thing} {where}.", "It is {where}: {a_thing}.", "{a_thing}, {where}")

OBJECT_SENTENCES = (
    "{Where} there is {a_thing}.", "{A_thing} is {where}.", "{Where} is {a_thing}.", "There is {a_thing} {where}.",
    "{A_thing} can be seen {where}.",
)  # fmt: skip


def caption(scene: Scene, rng: random.Random) -> str:
    """One sentence of at most about 16 words naming every object, with colours three times out of four."""
    if rng.random() < 0.25:
        counts = Counter(o.category for o in scene.objects)
        things = [with_article(c) if n == 1 else f"{NUMBER_WORDS[n]} {v.PLURALS[c]}" for c, n in counts.items()]
        templates = CAPTION_TEMPLATES if next(iter(counts.values())) == 1 else PLURAL_TEMPLATES
    else:
        things = [with_article(f"{o.colour} {o.category}") for o in scene.objects]
        templates = CAPTION_TEMPLATES
    template = rng.choice(templates) if len(things) <= 4 else "{list}."
    return sentence_case(template.format(list=join_list(things)))


def describe(scene: Scene, rng: random.Random) -> str:
    """Long description: the number of objects, then each with all its attributes and its place, in reading order."""
    return describe_objects(scene.objects, rng)


def describe_objects(objects: Sequence[SceneObject], rng: random.Random) -> str:
    """`describe` for any list of objects; equal ``rng`` states give equal wordings whatever the objects' attributes."""
    sentences = [rng.choice(OPENINGS).format(number=NUMBER_WORDS[len(objects)])]
    for item in sorted(objects, key=lambda o: (o.row, o.column)):
        a_thing, where = with_article(noun_phrase(item)), PLACE_PHRASES[item.place]
        template = rng.choice(OBJECT_SENTENCES)
        sentences.append(
            template.format(a_thing=a_thing, where=where, A_thing=sentence_case(a_thing), Where=sentence_case(where))
        )
    return " ".join(sentences)


def describe_object(item: SceneObject, rng: random.Random) -> str:
    """All of one object in one sentence."""
    a_thing, where = with_article(noun_phrase(item)), PLACE_PHRASES[item.place]
    return rng.choice(OBJECT_ANSWERS).format(a_thing=a_thing, where=where)


def object_turns(scene: Scene, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Up to ``count`` requests to describe one object that has a name of its own, with the answers.

    A whole sentence that hangs on one name: it teaches to find an object by its name far sooner than short answers do.
    """
    named = references(scene)
    return [
        (rng.choice(OBJECT_REQUESTS["train"]).format(thing=name), describe_object(item, rng))
        for item, name in rng.sample(named, min(count, len(named)))
    ]


def relation_sentences(scene: Scene, rng: random.Random, count: int, among: Sequence[SceneObject]) -> list[str]:
    """Up to ``count`` true sentences on where the objects ``among`` those of the scene are relative to each other."""
    words = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
    named = [(item, name) for item, name in references(scene) if item in among]
    pairs = [(a, b) for i, a in enumerate(named) for b in named[i + 1 :]]
    sentences = []
    for (a, a_name), (b, b_name) in rng.sample(pairs, min(count, len(pairs))):
        direction = rng.choice(directions_between(a, b))
        sentences.append(f"The {a_name} is {words[direction]} the {b_name}.")
    return sentences
