"""Questions about single objects: existence, count, attribute, reading. Each function lists all that can be asked.

Every function takes a scene and returns only questions with exactly one right answer.
"""

from collections import Counter
from collections.abc import Iterable

from moevlm.world import vocabulary as v
from moevlm.world.scenes import Scene
from moevlm.world.texts.questions import Question, yes_no
from moevlm.world.texts.wording import NUMBER_WORDS, label_phrase, references, with_article


def exists_category(scene: Scene) -> list[Question]:
    """Is there a star?"""
    there = {o.category for o in scene.objects}
    return [existence(c, c in there) for c in v.CATEGORIES]


def existence(category: str, truth: bool) -> Question:
    """One existence question of known answer, also for probes."""
    slots = {"a_thing": with_article(category), "things": v.PLURALS[category]}
    return Question("existence", "exists", slots, yes_no(truth), f"exists {category}")


def exists_coloured(scene: Scene) -> list[Question]:
    """Is there a red star? The wrong ones combine a colour and a category that are both there."""
    there = {(o.colour, o.category) for o in scene.objects}
    colours, categories = sorted({c for c, _ in there}), sorted({c for _, c in there})
    return [
        Question("existence", "exists",
                 {"a_thing": with_article(f"{colour} {category}"), "things": f"{colour} {v.PLURALS[category]}"},
                 yes_no((colour, category) in there), "exists coloured")
        for colour in colours for category in categories
    ]  # fmt: skip


def count_category(scene: Scene) -> list[Question]:
    """How many stars are there?"""
    counts = Counter(o.category for o in scene.objects)
    return [_count(v.PLURALS[c], counts[c]) for c in v.CATEGORIES]


def count_attribute(scene: Scene) -> list[Question]:
    """How many red, large or striped objects are there?"""
    counts = _attribute_counts(scene)
    return [_count(f"{value} objects", counts[value]) for value in (*v.COLOURS, *v.SIZES, *v.TEXTURES)]


def count_all(scene: Scene) -> list[Question]:
    """How many objects are there?"""
    return [_count("objects", len(scene.objects))]


def is_count(scene: Scene) -> list[Question]:
    """Are there exactly two stars? Asked with the true number and with its neighbours."""
    counts = Counter(o.category for o in scene.objects)
    things = {v.PLURALS[c]: n for c, n in counts.items()} | {"objects": len(scene.objects)}
    return [
        Question("count", "is_count", {"number": NUMBER_WORDS[asked], "things": name}, yes_no(asked == true),
                 f"is_count {asked} {name == 'objects'}")
        for name, true in sorted(things.items()) for asked in (true - 1, true, true + 1) if asked >= 2
    ]  # fmt: skip


def colour_of(scene: Scene) -> list[Question]:
    """What colour is the star?"""
    return [
        Question("attribute", "colour_of", {"thing": name}, item.colour, f"colour_of {item.category}")
        for item, name in references(scene, hide="colour")
    ]


def texture_of(scene: Scene) -> list[Question]:
    """Is the star plain, striped or dotted?"""
    return [
        Question("attribute", "texture_of", {"thing": name}, item.texture, f"texture_of {item.category}")
        for item, name in references(scene, hide="texture")
    ]


def size_of(scene: Scene) -> list[Question]:
    """How large is the star?"""
    return [
        Question("attribute", "size_of", {"thing": name}, item.size, f"size_of {item.category}")
        for item, name in references(scene, hide="size")
    ]


def shape_of(scene: Scene) -> list[Question]:
    """What shape is the red object? Asked of a colour that one object has."""
    counts = _attribute_counts(scene)
    return [
        Question("attribute", "shape_of", {"value": o.colour}, o.category, f"shape_of {o.colour}", o, "colour")
        for o in scene.objects if counts[o.colour] == 1
    ]  # fmt: skip


def is_colour(scene: Scene) -> list[Question]:
    """Is the star red?"""
    return [
        Question("attribute", "is_value", _value_slots(name, colour), yes_no(item.colour == colour),
                 f"is_colour {colour}")
        for item, name in references(scene, hide="colour") for colour in v.COLOURS
    ]  # fmt: skip


def is_texture(scene: Scene) -> list[Question]:
    """Is the star striped?"""
    return [
        Question("attribute", "is_value", _value_slots(name, texture), yes_no(item.texture == texture),
                 f"is_texture {texture}")
        for item, name in references(scene, hide="texture") for texture in v.TEXTURES
    ]  # fmt: skip


def label_on(scene: Scene) -> list[Question]:
    """What is written on the star?"""
    return [
        Question("reading", "label_on", {"thing": name}, item.label.lower(), "label_on")
        for item, name in references(scene) if item.label is not None
    ]  # fmt: skip


def labelled_object(scene: Scene) -> list[Question]:
    """Which object has the word CAT on it?"""
    return [
        Question(
            "reading", "labelled_object", {"label": label_phrase(label)}, o.category, "labelled_object", o, "label"
        )
        for o in scene.objects
        for label in _unique_label(scene, o.label)
    ]


def labelled_colour(scene: Scene) -> list[Question]:
    """What colour is the object with the word CAT on it?"""
    return [
        Question("reading", "labelled_colour", {"label": label_phrase(label)}, o.colour, "labelled_colour")
        for o in scene.objects for label in _unique_label(scene, o.label)
    ]  # fmt: skip


def has_label(scene: Scene) -> list[Question]:
    """Is the word CAT written on the star? Asked of labelled objects, and often with a label of another object."""
    labels = [o.label for o in scene.objects if o.label is not None]
    questions = []
    for item, name in references(scene):
        if item.label is not None:
            kin = v.DIGITS if item.label in v.DIGITS else v.WORDS
            other = kin[(kin.index(item.label) + 1 + scene.background_seed % (len(kin) - 1)) % len(kin)]
            for asked in sorted({*labels, other}):
                slots = {"thing": name, "label": label_phrase(asked)}
                questions.append(Question("reading", "has_label", slots, yes_no(asked == item.label), "has_label"))
    return questions


def _value_slots(thing: str, value: str) -> dict[str, str]:
    return {"thing": thing, "value": value, "a_value": with_article(value)}


def _count(things: str, number: int) -> Question:
    return Question("count", "count", {"things": things}, NUMBER_WORDS[number], f"count {things}")


def _attribute_counts(scene: Scene) -> Counter[str]:
    return Counter(value for o in scene.objects for value in (o.colour, o.size, o.texture))


def _unique_label(scene: Scene, label: str | None) -> Iterable[str]:
    return [label] if label is not None and sum(o.label == label for o in scene.objects) == 1 else []
