"""Questions about where objects are and how they compare. Each function lists all that can be asked of a scene.

Places and directions are those of the 3 x 3 grid: one object is left of another if its column is, so that nothing hangs
on a pixel.
"""

import math
from collections.abc import Iterator

from moevlm.world import vocabulary as v
from moevlm.world.scenes import Scene, SceneObject
from moevlm.world.texts.questions import Question, yes_no
from moevlm.world.texts.wording import PLACE_PHRASES, references

NEAREST_MARGIN = 1.25  # the second nearest must be this much further away than the nearest

Named = tuple[SceneObject, str]


def place_of(scene: Scene) -> list[Question]:
    """Where is the star?"""
    return [
        Question("spatial", "place_of", {"thing": name}, item.place, "place_of") for item, name in references(scene)
    ]


def shape_at(scene: Scene) -> list[Question]:
    """What is in the top left? A cell holds at most one object."""
    return [
        Question(
            "spatial", "shape_at", {"where": PLACE_PHRASES[o.place]}, o.category, f"shape_at {o.place}", o, "place"
        )
        for o in scene.objects
    ]


def relation(scene: Scene) -> list[Question]:
    """Where is the star relative to the moon? Asked of two objects in one row or one column."""
    return [
        Question("spatial", "relation", {"thing": a_name, "other": b_name}, directions[0], "relation")
        for (a, a_name), (b, b_name) in _pairs(scene)
        if len(directions := directions_between(a, b)) == 1
    ]


def extreme(scene: Scene) -> list[Question]:
    """Which object is the leftmost? Asked if one object alone is."""
    questions = []
    for side, key, pick in (
        ("leftmost", "column", min), ("rightmost", "column", max), ("highest", "row", min), ("lowest", "row", max),
    ):  # fmt: skip
        edge = pick(getattr(o, key) for o in scene.objects)
        first, *rest = [o for o in scene.objects if getattr(o, key) == edge]
        if not rest:
            questions.append(
                Question("spatial", "extreme", {"side": side}, first.category, f"extreme {side}", first, "place")
            )
    return questions


def nearest(scene: Scene) -> list[Question]:
    """Which object is nearest to the star? Asked if the second nearest is clearly further."""
    questions = []
    for item, name in references(scene):
        others = [o for o in scene.objects if o is not item]
        by_distance = sorted((math.hypot(o.x - item.x, o.y - item.y), i) for i, o in enumerate(others))
        if len(others) > 1 and by_distance[1][0] > NEAREST_MARGIN * by_distance[0][0]:
            answer = others[by_distance[0][1]].category
            questions.append(Question("spatial", "nearest", {"thing": name}, answer, f"nearest {item.category}"))
    return questions


def is_side(scene: Scene) -> list[Question]:
    """Is the star to the left of the moon?"""
    opposites = {"to the left of": "to the right of", "above": "below"}
    opposites |= {b: a for a, b in opposites.items()}
    words = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
    return [
        Question(
            "spatial", "is_side", {"thing": a_name, "other": b_name, "side": asked}, yes_no(asked == true), "is_side"
        )
        for (a, a_name), (b, b_name) in _pairs(scene)
        for true in (words[d] for d in directions_between(a, b))
        for asked in (true, opposites[true])
    ]


def match_colour(scene: Scene) -> list[Question]:
    """Which object has the same colour as the star?"""
    return _matches(scene, "colour")


def match_texture(scene: Scene) -> list[Question]:
    """Which object has the same texture as the star?"""
    return _matches(scene, "texture")


def odd_one(scene: Scene) -> list[Question]:
    """What is the only large object? Asked of sizes and textures, among at least three objects."""
    return [
        Question(
            "comparison", "odd_one", {"value": value}, bearers[0].category, f"odd_one {value}", bearers[0], attribute
        )
        for attribute, values in (("size", v.SIZES), ("texture", v.TEXTURES))
        for value in values
        if len(scene.objects) >= 3 and len(bearers := [o for o in scene.objects if getattr(o, attribute) == value]) == 1
    ]


def larger_of(scene: Scene) -> list[Question]:
    """Which is larger, the star or the moon? Or smaller; the answer comes first as often as second."""
    questions = []
    for (a, a_name), (b, b_name) in _pairs(scene):
        if a.size != b.size and a.category != b.category:
            for comparative, size in (("larger", "large"), ("smaller", "small")):
                slots = {"comparative": comparative, "thing": a_name, "other": b_name}
                answer = a.category if a.size == size else b.category
                questions.append(Question("comparison", "larger_of", slots, answer, f"larger_of {a.size == size}"))
    return questions


def same_attribute(scene: Scene) -> list[Question]:
    """Do the star and the moon have the same colour? Or texture, or size."""
    return [
        Question("comparison", "same", {"thing": a_name, "other": b_name, "attribute": attribute},
                 yes_no(getattr(a, attribute) == getattr(b, attribute)), f"same {attribute}")
        for attribute in ("colour", "texture", "size")
        for (a, a_name), (b, b_name) in _pairs(scene, hide=attribute)
    ]  # fmt: skip


def more_than(scene: Scene) -> list[Question]:
    """Are there more red objects than blue objects? Asked of values that are there; a draw is no."""
    questions = []
    for attribute in ("category", "colour", "size", "texture"):
        values = [getattr(o, attribute) for o in scene.objects]
        for a in sorted(set(values)):
            for b in sorted(set(values) - {a}):
                names = [v.PLURALS[x] if attribute == "category" else f"{x} objects" for x in (a, b)]
                truth = yes_no(values.count(a) > values.count(b))
                slots = {"things": names[0], "others": names[1]}
                questions.append(Question("comparison", "more_than", slots, truth, f"more_than {attribute}"))
    return questions


def directions_between(a: SceneObject, b: SceneObject) -> list[str]:
    """Where ``a`` is as seen from ``b``: left or right by column, above or below by row; both, one or none of them."""
    horizontal = {-1: ["left"], 0: [], 1: ["right"]}[(a.column > b.column) - (a.column < b.column)]
    vertical = {-1: ["above"], 0: [], 1: ["below"]}[(a.row > b.row) - (a.row < b.row)]
    return horizontal + vertical


def _pairs(scene: Scene, *, hide: str = "") -> Iterator[tuple[Named, Named]]:
    named = references(scene, hide=hide)
    return ((a, b) for a in named for b in named if a[0] is not b[0])


def _matches(scene: Scene, attribute: str) -> list[Question]:
    questions = []
    for item, name in references(scene, hide=attribute):
        alike = [o for o in scene.objects if o is not item and getattr(o, attribute) == getattr(item, attribute)]
        if len(alike) == 1 and len(scene.objects) >= 3:
            slots = {"thing": name, "attribute": attribute}
            answer = alike[0].category
            questions.append(Question("comparison", "match", slots, answer, f"match {attribute} {item.category}"))
    return questions
