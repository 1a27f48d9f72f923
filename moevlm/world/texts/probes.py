"""POPE-style probes of object hallucination (arXiv:2305.10355): is there a star, asked where the prior says yes."""

import random

from moevlm.world import vocabulary as v
from moevlm.world.cooccurrence import CoOccurrence
from moevlm.world.ground_truth import categories
from moevlm.world.scenes import Scene
from moevlm.world.texts.object_questions import existence
from moevlm.world.texts.questions import Question

NEGATIVES = ("random", "popular", "adversarial")
MAX_POSITIVES = 3  # as in POPE: at most three things that are there and as many that are not


def probe_questions(scene: Scene, negatives: str, prior: CoOccurrence, seed: int) -> list[Question]:
    """As many probes answered yes as no, alternating, at most `MAX_POSITIVES` of each.

    Args:
        scene: a test scene.
        negatives: how the absent categories are chosen: ``random``; ``popular``, the most frequent in ``prior``;
            ``adversarial``, those that co-occur most with what is there.
        prior: statistics of the training scenes.
        seed: with the scene's name it fixes the choice; positives are the same for all three kinds of negatives.

    Raises:
        ValueError: unknown kind of negatives.
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"unknown negatives {negatives!r}; known: {', '.join(NEGATIVES)}")
    rng = random.Random(f"probe/{seed}/{scene.scene_id}")
    present = categories(scene)
    absent = [c for c in v.CATEGORIES if c not in present]
    positives = rng.sample(present, min(MAX_POSITIVES, len(present)))
    ranked = {
        "random": lambda: rng.sample(absent, len(absent)),
        "popular": lambda: prior.most_popular(absent),
        "adversarial": lambda: prior.most_cooccurring(present, absent),
    }[negatives]()
    pairs = zip(positives, ranked[: len(positives)], strict=True)
    return [question for yes, no in pairs for question in (existence(yes, True), existence(no, False))]


def word_probe(question: Question) -> str:
    """The one wording of every probe."""
    return f"Is there {question.slots['a_thing']} in the image?"
