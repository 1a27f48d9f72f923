"""A question before it is put into words, the wording of it, and the choice among questions that balances answers."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moevlm.world.scenes import SceneObject
from moevlm.world.texts.wording import sentence_case

PHRASING_SPLITS = ("train", "heldout")

# form -> phrasing split -> templates; a template's {slots} are filled from Question.slots.
Phrasings = Mapping[str, Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class Question:
    """What is asked, apart from its wording."""

    kind: str  # existence, count, attribute, spatial, comparison, reading, conversation or text
    form: str  # key into the phrasings; finer than the kind
    slots: Mapping[str, str]
    answer: str
    stem: str  # questions of one stem should have evenly spread answers, or a blind model profits
    target: SceneObject | None = field(default=None, compare=False)  # the object that the answer names, if it names one
    reveals: str = ""  # attribute of the target that the question gives away

    @property
    def open(self) -> bool:
        """Whether more than yes and no can be answered."""
        return self.answer not in ("yes", "no")


def yes_no(truth: bool) -> str:
    """``yes`` or ``no``."""
    return "yes" if truth else "no"


def word_question(question: Question, phrasings: Phrasings, rng: random.Random, *, phrasing: str) -> str:
    """Put a question into one of the wordings of its form.

    Raises:
        ValueError: ``phrasing`` is neither ``train`` nor ``heldout``.
    """
    if phrasing not in PHRASING_SPLITS:
        raise ValueError(f"unknown phrasing {phrasing!r}; known: {', '.join(PHRASING_SPLITS)}")
    return sentence_case(rng.choice(phrasings[question.form][phrasing]).format_map(question.slots))


class AnswerBalancer:
    """Chooses, among questions that could be asked, the one whose answer its stem has had least often.

    One balancer per set of records. It keeps the answers of each stem (say, of ``is there a star?``) even, and so takes
    from a blind model what the biased co-occurrence of the world would otherwise give it.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def choose(self, candidates: Sequence[Question], rng: random.Random) -> Question:
        """Choose and count one; ties are broken by the form's count of the answer, then by ``rng``.

        Raises:
            ValueError: there is nothing to choose from.
        """
        if not candidates:
            raise ValueError("no candidate question")
        counts = self._counts
        costs = [(counts[q.stem, q.answer], counts[q.form, q.answer]) for q in candidates]
        least = min(costs)
        chosen = rng.choice([q for q, cost in zip(candidates, costs, strict=True) if cost == least])
        counts[chosen.stem, chosen.answer] += 1
        if chosen.stem != chosen.form:
            counts[chosen.form, chosen.answer] += 1
        return chosen
