"""LLaVA records about stamps: captions, instructions, preference pairs, held-out questions and POPE probes.

Every answer follows from the description, the folder or the pixels of a picture, so nothing here is guessed. Choices
(phrasing, order, negatives) come from a hash of the seed and the picture, never from a shared random state: a picture
added to the package changes no other picture's records.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from moevlm.data.converters.stamps_labels import EXCLUSIVE_CATEGORIES, PHRASES, group_of, may_deny, name_of, style_of
from moevlm.data.converters.stamps_pictures import Stamp

Record = dict[str, Any]
T = TypeVar("T")

CAPTION_PROMPTS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "What does this picture show?",
    "Summarize the content of the image in one sentence.",
)
PROMPTS: dict[str, tuple[str, ...]] = {
    "name": ("What is this?", "What is the thing in the picture called?", "Name the thing in the picture."),
    "category": (
        "What kind of thing is in the picture?",
        "Which category does the thing in the picture belong to?",
        "Name the category of the thing shown.",
    ),
    "animal_group": ("Is this animal a bird, a fish, an insect or a mammal?", "Which group of animals is this?"),
    "food_group": ("Is this food a fruit or a vegetable?", "Which group of food is this?"),
    "colour": (
        "What is the main colour of the thing in the picture?",
        "Which colour covers most of the thing shown?",
        "Name the main colour of the thing.",
    ),
    "shape": (
        "Is the thing in the picture wide, tall or square?",
        "What are the proportions of the thing shown: wide, tall or square?",
    ),
    "style": ("Is this letter filled or outlined?", "How is the letter drawn, filled or outlined?"),
    "existence": ("Is there {} in the picture?", "Does the picture show {}?", "Can you see {} in the image?"),
}
OPEN_KINDS = ("name", "category", "animal_group", "food_group", "colour", "shape", "style")
HELD_OUT_KINDS = OPEN_KINDS[1:]  # the names of held-out subjects were never in training
POPE_NEGATIVES = ("random", "popular", "adversarial")
NUM_POPULAR = 3


def pick(options: Sequence[T], *key: object) -> T:
    """One of the options, by a hash of the key."""
    return options[int.from_bytes(_digest(*key)[:8], "big") % len(options)]


def shuffled(items: Iterable[T], *key: object, name: Callable[[T], str]) -> list[T]:
    """The items in the order of a hash of the key and each item's name."""
    return sorted(items, key=lambda item: _digest(*key, name(item)))


def _digest(*key: object) -> bytes:
    return hashlib.sha256("|".join(map(str, key)).encode()).digest()


def _path(stamp: Stamp) -> str:
    return stamp.path


def slug(path: str) -> str:
    """A path as part of a record id: no dots, which would end a WebDataset key, and no slashes."""
    return path.rsplit(".", 1)[0].replace("/", "-").replace(".", "-")


def image_path(stamp: Stamp) -> str:
    return f"images/{stamp.path.rsplit('.', 1)[0].replace('.', '-')}.jpg"


def turns(question: str, answer: str, *, first: bool = True) -> list[Record]:
    """One question and its answer; the first question of a conversation carries the image."""
    return [
        {"from": "human", "value": ("<image>\n" if first else "") + question},
        {"from": "gpt", "value": answer},
    ]


def record(stamp: Stamp, kind: str, conversation: list[Record], *, suffix: str = "") -> Record:
    return {
        "id": f"stamps-{slug(stamp.path)}-{kind}{suffix}",
        "image": image_path(stamp),
        "conversations": conversation,
        "kind": kind,
        "open": kind != "existence",
    }


def answer_of(stamp: Stamp, kind: str) -> str | None:
    """The true answer to a question kind, or None where the kind does not apply to this picture."""
    if kind.endswith("_group"):
        group = group_of(stamp.path)
        return group[1] if group and group[0] == kind else None
    if kind == "name":
        return name_of(stamp.description)
    if kind == "style":
        return style_of(stamp.path)
    return {"category": stamp.category, "colour": stamp.colour, "shape": stamp.shape}[kind]


def ask(stamp: Stamp, kind: str, *, seed: int) -> tuple[str, str] | None:
    """(question, answer) of an open kind."""
    answer = answer_of(stamp, kind)
    return None if answer is None else (pick(PROMPTS[kind], seed, stamp.path, kind), answer)


def ask_existence(stamp: Stamp, asked: str, *phrasing_key: object) -> tuple[str, str]:
    """(question, answer) for "is there <asked>?", the phrasing chosen by a hash of the key."""
    question = pick(PROMPTS["existence"], *phrasing_key).format(PHRASES[asked])
    return question, "yes" if asked == stamp.category else "no"


def captions(stamps: Sequence[Stamp], *, seed: int) -> list[Record]:
    """The package's description of every picture."""
    return [
        record(stamp, "caption", turns(pick(CAPTION_PROMPTS, seed, stamp.path, "caption"), stamp.description))
        for stamp in stamps
    ]


def open_questions(stamps: Sequence[Stamp], kinds: Sequence[str], *, seed: int) -> list[Record]:
    """Every applicable open question about every picture."""
    asked = ((stamp, kind, ask(stamp, kind, seed=seed)) for stamp in stamps for kind in kinds)
    return [record(stamp, kind, turns(*pair)) for stamp, kind, pair in asked if pair is not None]


def existence_questions(stamps: Sequence[Stamp], positives: Sequence[Stamp], *, seed: int) -> list[Record]:
    """For every category as many pictures without it as with it, so that the question alone tells nothing."""
    records: list[Record] = []
    for asked in PHRASES:
        shown = [stamp for stamp in positives if stamp.category == asked]
        absent = [stamp for stamp in stamps if stamp.category and may_deny(stamp.category, asked)]
        absent = shuffled(absent, seed, asked, name=_path)[: len(shown)]
        for index, pair in enumerate(zip(shown, absent)):
            for stamp in pair:  # one with, one without, asked in the same words
                talk = turns(*ask_existence(stamp, asked, seed, asked, index))
                records.append(record(stamp, "existence", talk, suffix=f"-{asked.replace(' ', '-')}"))
    return records


def conversations(stamps: Sequence[Stamp], *, seed: int) -> list[Record]:
    """One conversation of several turns for every picture that at least two open kinds apply to."""
    records = []
    for stamp in stamps:
        pairs = [pair for kind in OPEN_KINDS[1:] if (pair := ask(stamp, kind, seed=seed)) is not None]
        if len(pairs) < 2:
            continue
        pairs = shuffled(pairs, seed, stamp.path, "conversation", name=lambda pair: pair[0])
        talk = [turn for i, pair in enumerate(pairs) for turn in turns(*pair, first=i == 0)]
        records.append(record(stamp, "conversation", talk))
    return records


def gold(item: Record) -> str:
    """The last answer of a record."""
    return item["conversations"][-1]["value"]


def balanced(items: Sequence[T], answer: Callable[[T], str], *, max_excess: float) -> list[T]:
    """Drop items from the end of too frequent answers until none holds more than 1 / num_answers + max_excess."""
    counts = Counter(map(answer, items))
    share = 1 / len(counts) + max_excess if counts else 1.0
    cap = max(counts.values(), default=0)
    while cap > 1 and cap > share * sum(min(count, cap) for count in counts.values()) + 1e-9:
        cap -= 1
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[answer(item)] += 1
        if seen[answer(item)] <= cap:
            kept.append(item)
    return kept


def balanced_by_category(stamps: Sequence[Stamp], *, seed: int, max_excess: float) -> list[Stamp]:
    """Pictures that have a category, no category too frequent."""
    named = shuffled((stamp for stamp in stamps if stamp.category), seed, name=_path)
    return balanced(named, lambda stamp: str(stamp.category), max_excess=max_excess)


def held_out_questions(stamps: Sequence[Stamp], *, seed: int, max_excess: float) -> list[Record]:
    """Questions with balanced answers, kind by kind, that a model can answer about subjects it has never met."""
    records: list[Record] = []
    for kind in HELD_OUT_KINDS:
        questions = open_questions(shuffled(stamps, seed, kind, name=_path), [kind], seed=seed)
        records += balanced(questions, gold, max_excess=max_excess)
    positives = balanced_by_category(stamps, seed=seed, max_excess=max_excess)
    return records + existence_questions(stamps, positives, seed=seed)


def pope_questions(
    negatives: str, stamps: Sequence[Stamp], training: Sequence[Stamp], *, seed: int, max_excess: float
) -> list[Record]:
    """POPE (arXiv:2305.10355) on categories: per picture one question about what it shows and one about what it lacks.

    The lacking category is random; or popular: one of the most frequent ones in training; or adversarial. POPE takes
    for the last what often occurs together, but a stamp shows one thing: here it is the category whose training
    pictures, averaged, look most like this picture. Yes and no are even over the set, not for each question text.
    """
    frequency = Counter(stamp.category for stamp in training if stamp.category)
    looks = {
        category: np.mean([stamp.thumbnail for stamp in training if stamp.category == category], axis=0)
        for category in frequency
    }
    records: list[Record] = []
    for stamp in balanced_by_category(stamps, seed=seed, max_excess=max_excess):
        assert stamp.category is not None
        options = sorted(category for category in frequency if may_deny(stamp.category, category))
        if not options:
            continue
        if negatives == "random":
            lacking = pick(options, seed, stamp.path, "random")
        elif negatives == "popular":
            options.sort(key=lambda category: -frequency[category])
            lacking = pick(options[:NUM_POPULAR], seed, stamp.path, "popular")
        else:
            thumbnail = stamp.thumbnail
            lacking = min(options, key=lambda category: float(np.linalg.norm(looks[category] - thumbnail)))
        for asked, suffix in ((stamp.category, "-yes"), (lacking, "-no")):
            talk = turns(*ask_existence(stamp, asked, seed, stamp.path))
            records.append(record(stamp, "existence", talk, suffix=f"-{negatives}{suffix}"))
    return records


def preferences(stamps: Sequence[Stamp], *, seed: int) -> list[Record]:
    """Right against wrong: the description of another picture of the same category, and another category."""
    records: list[Record] = []
    for stamp in stamps:
        prompts = {"description": CAPTION_PROMPTS, "category": PROMPTS["category"]}
        pairs = {"description": (stamp.description, _wrong_description(stamp, stamps, seed=seed))}
        if stamp.category:
            others = [category for category in PHRASES if may_deny(stamp.category, category)]
            pairs["category"] = (stamp.category, pick(others, seed, stamp.path, "preference"))
        for kind, (chosen, rejected) in pairs.items():
            if rejected is None:
                continue
            question = pick(prompts[kind], seed, stamp.path, "preference", kind)
            records.append(
                {
                    "id": f"stamps-{slug(stamp.path)}-preference-{kind}",
                    "image": image_path(stamp),
                    "chosen": turns(question, chosen),
                    "rejected": turns(question, rejected),
                    "kind": kind,
                }
            )
    return records


def _wrong_description(stamp: Stamp, stamps: Sequence[Stamp], *, seed: int) -> str | None:
    """A description of the same category that is certainly false here: no shared word, another kind of subject."""
    if stamp.category is None:
        return None
    candidates = [
        other.description
        for other in stamps
        if other.category == stamp.category and other.description.casefold() != stamp.description.casefold()
        if stamp.category in EXCLUSIVE_CATEGORIES or _unrelated(stamp, other)
    ]
    return pick(sorted(set(candidates)), seed, stamp.path, "wrong") if candidates else None


def _unrelated(one: Stamp, other: Stamp) -> bool:
    """Filed under different subjects (birds, mammals) and described without a common word of four letters or more."""
    subjects = [stamp.path.split("/")[1:2] for stamp in (one, other) if stamp.path.count("/") > 1]
    words = [
        {word for word in stamp.description.casefold().replace(".", " ").split() if len(word) > 3}
        for stamp in (one, other)
    ]
    return len(subjects) == 2 and subjects[0] != subjects[1] and not words[0] & words[1]
