"""Text for pretraining the language model: descriptions with questions that they answer, and facts without a scene.

The decoder so learns the world's words, and to answer from what its context shows, before it ever meets an image. Only
train phrasings occur, and a caller should pass training scenes only.
"""

import random

from moevlm.world.ground_truth import ATTRIBUTES, patch_labels
from moevlm.world.scenes import Scene
from moevlm.world.texts.conversations import talk
from moevlm.world.texts.descriptions import caption, describe
from moevlm.world.texts.phrasings import CAPTION_REQUESTS, DESCRIPTION_REQUESTS
from moevlm.world.texts.questions import AnswerBalancer
from moevlm.world.texts.text_questions import draw_text_question, word_text
from moevlm.world.texts.wording import label_phrase

Turn = tuple[str, str]  # (user, assistant)

# Shares of the tasks a pretraining conversation opens with; all but the first are one turn, then questions follow.
OPENING_TASKS = {"questions": 0.6, "caption": 0.1, "describe": 0.3}
NOTHING_THERE = "nothing"  # the word of a patch without an object
# What may be said of a patch's category, colour, size, texture and label.
PATCH_WORD_CHOICES = tuple(
    tuple(map(label_phrase, names)) if attribute == "label" else names for attribute, names in ATTRIBUTES.items()
)
NOTES_SHARE = 0.5  # of the scenes that questions or captions are about: told as terse notes, not in sentences


def pretraining_conversation(
    scene: Scene,
    rng: random.Random,
    balancer: AnswerBalancer | None = None,
    *,
    num_questions: int = 10,
    picture: str | None = None,
) -> list[Turn]:
    """Turns in which the user tells the scene and asks, and the assistant answers from what was told.

    Args:
        scene: a training scene.
        rng: source of every choice.
        balancer: one for all documents keeps their answers even; without it only those of this document are.
        num_questions: number of turns after the opening task, or with it.
        picture: what stands for a picture of the scene, which is then told in no other way.

    Raises:
        ValueError: num_questions is less than 1.
    """
    if num_questions < 1:
        raise ValueError(f"num_questions must be at least 1, got {num_questions}")
    balancer = balancer or AnswerBalancer()
    task = rng.choices(list(OPENING_TASKS), list(OPENING_TASKS.values()))[0]
    questions = talk(scene, num_questions, rng, balancer, from_description=picture is None)
    if task == "describe":
        request = rng.choice(DESCRIPTION_REQUESTS["train"])
        return [(f"{picture or list_objects(scene)}\n{request}", describe(scene, rng)), *questions]
    told = picture or (list_objects(scene) if rng.random() < NOTES_SHARE else describe(scene, rng))
    if task == "caption":
        return [(f"{told}\n{rng.choice(CAPTION_REQUESTS['train'])}", caption(scene, rng)), *questions]
    (first_question, first_answer), *rest = questions
    return [(f"{told}\n{first_question}", first_answer), *rest]


def text_only_conversation(
    rng: random.Random, balancer: AnswerBalancer | None = None, *, num_questions: int = 4
) -> list[Turn]:
    """Turns that need no scene."""
    balancer = balancer or AnswerBalancer()
    questions = [draw_text_question(rng, balancer) for _ in range(num_questions)]
    return [(word_text(q, rng, phrasing="train"), q.answer) for q in questions]


def pretraining_document(scene: Scene, rng: random.Random) -> str:
    """`pretraining_conversation` as plain text, a line for each user and assistant turn."""
    return _plain_text(pretraining_conversation(scene, rng))


def text_only_document(rng: random.Random) -> str:
    """`text_only_conversation` as plain text."""
    return _plain_text(text_only_conversation(rng))


def patch_words(scene: Scene, grid: int) -> list[str]:
    """What lies under each patch of a picture, in raster order: ``star red large striped the word CAT``, or nothing."""
    labels = patch_labels(scene, grid)
    words = []
    for number in range(grid * grid):
        ids = [int(labels[name].reshape(-1)[number]) for name in ATTRIBUTES]
        said = [choice[value - 1] for choice, value in zip(PATCH_WORD_CHOICES, ids, strict=True) if value]
        words.append(" ".join(said) or NOTHING_THERE)
    return words


def list_objects(scene: Scene) -> str:
    """The scene as terse notes, a line per object: ``top left: star, red, large, striped, the word CAT``."""
    lines = []
    for o in scene.objects:
        label = [] if o.label is None else [label_phrase(o.label)]
        lines.append(f"{o.place}: " + ", ".join([o.category, o.colour, o.size, o.texture, *label]))
    return "\n".join(lines)


def _plain_text(turns: list[Turn]) -> str:
    return "\n".join(f"{user}\n{assistant}" for user, assistant in turns)
