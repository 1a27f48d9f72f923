"""Words for objects: articles, plurals, numbers, places, and the shortest name that picks out one object of a scene."""

from collections.abc import Sequence

from moevlm.world import vocabulary as v
from moevlm.world.scenes import Scene, SceneObject

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip

PLACE_PHRASES = {
    "top left": "in the top left", "top": "at the top", "top right": "in the top right",
    "left": "on the left", "centre": "in the centre", "right": "on the right",
    "bottom left": "in the bottom left", "bottom": "at the bottom", "bottom right": "in the bottom right",
}  # fmt: skip


def with_article(noun: str) -> str:
    """``an arrow``, ``a red star``."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def sentence_case(text: str) -> str:
    """Upper-case the first letter and leave the rest, labels included, alone."""
    return text[:1].upper() + text[1:]


def join_list(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def label_phrase(label: str) -> str:
    """``the number 7`` or ``the word CAT``."""
    return f"the number {label}" if label in v.DIGITS else f"the word {label}"


def noun_phrase(item: SceneObject) -> str:
    """All of an object but its place, without article: ``large red striped star with the word CAT on it``."""
    phrase = f"{item.size} {item.colour} {item.texture} {item.category}"
    return phrase if item.label is None else f"{phrase} with {label_phrase(item.label)} on it"


def reference(scene: Scene, item: SceneObject, *, hide: str = "") -> str | None:
    """Shortest name that only this object has: its category, or that with one adjective; None if there is none.

    Args:
        scene: where the object is.
        item: one of its objects.
        hide: attribute that the name must not give away, because it is asked for.
    """
    rivals = [o for o in scene.objects if o.category == item.category]
    if len(rivals) == 1:
        return item.category
    for attribute in ("colour", "size", "texture"):
        value = getattr(item, attribute)
        if attribute != hide and sum(getattr(o, attribute) == value for o in rivals) == 1:
            return f"{value} {item.category}"
    return None


def references(scene: Scene, *, hide: str = "") -> list[tuple[SceneObject, str]]:
    """Every object that has such a name, with it."""
    named = ((item, reference(scene, item, hide=hide)) for item in scene.objects)
    return [(item, name) for item, name in named if name is not None]
