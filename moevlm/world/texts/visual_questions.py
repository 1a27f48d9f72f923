"""Which visual questions there are, how often each form is asked, and how one is drawn for a scene."""

import random
from collections.abc import Callable, Sequence

from moevlm.world.scenes import Scene
from moevlm.world.texts import object_questions as objects
from moevlm.world.texts import relation_questions as relations
from moevlm.world.texts.phrasings import VISUAL_PHRASINGS
from moevlm.world.texts.questions import AnswerBalancer, Question, word_question

Lister = Callable[[Scene], list[Question]]

# kind -> the functions that list its questions, each with the share of the kind's questions that it gets.
KINDS: dict[str, dict[Lister, float]] = {
    "existence": {objects.exists_category: 0.7, objects.exists_coloured: 0.3},
    "count": {
        objects.count_category: 0.35, objects.count_attribute: 0.35, objects.count_all: 0.15, objects.is_count: 0.15,
    },
    "attribute": {
        objects.colour_of: 0.3, objects.shape_of: 0.25, objects.texture_of: 0.15, objects.size_of: 0.1,
        objects.is_colour: 0.1, objects.is_texture: 0.1,
    },
    "spatial": {
        relations.place_of: 0.25, relations.shape_at: 0.15, relations.relation: 0.2, relations.extreme: 0.1,
        relations.nearest: 0.1, relations.is_side: 0.2,
    },
    "comparison": {
        relations.match_colour: 0.3, relations.match_texture: 0.25, relations.odd_one: 0.2, relations.larger_of: 0.1,
        relations.same_attribute: 0.1, relations.more_than: 0.05,
    },
    "reading": {
        objects.label_on: 0.4, objects.labelled_object: 0.25, objects.labelled_colour: 0.15, objects.has_label: 0.2,
    },
}  # fmt: skip
VISUAL_KINDS = (*KINDS, "conversation")

NOT_TOLD_BY_DESCRIPTIONS = frozenset({relations.nearest})  # these need exact positions


def draw_question(
    scene: Scene, kind: str, rng: random.Random, balancer: AnswerBalancer, *, from_description: bool = False
) -> Question | None:
    """Draw a question of a kind: its form by the shares of `KINDS`, then the one that balances answers best.

    Args:
        scene: ground truth.
        kind: one of `KINDS`.
        rng: source of every choice.
        balancer: that of the set of records the question goes into.
        from_description: only what a long description of the scene tells.

    Returns:
        None if nothing of this kind can be asked of the scene (no label to read, say).

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown question kind {kind!r}; known: {', '.join(KINDS)}")
    shares = dict(KINDS[kind])
    if from_description:
        shares = {lister: share for lister, share in shares.items() if lister not in NOT_TOLD_BY_DESCRIPTIONS}
    while shares:
        lister = rng.choices(list(shares), list(shares.values()))[0]
        candidates = lister(scene)
        if candidates:
            return balancer.choose(candidates, rng)
        del shares[lister]
    return None


def all_questions(scene: Scene, kinds: Sequence[str] = tuple(KINDS)) -> list[Question]:
    """Every question that can be asked of a scene."""
    return [question for kind in kinds for lister in KINDS[kind] for question in lister(scene)]


def word_visual(question: Question, rng: random.Random, *, phrasing: str) -> str:
    """Put a visual question into words; ``phrasing`` is train or heldout."""
    return word_question(question, VISUAL_PHRASINGS, rng, phrasing=phrasing)
