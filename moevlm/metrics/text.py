"""Answers as strings: when do two short answers say the same thing?"""

import re
from collections import Counter

_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_NOT_WORD = re.compile(r"[^\w.']+")


def normalise_answer(text: str) -> str:
    """The form in which answers are compared: lower case, one space, no punctuation, articles or number words.

    In the spirit of the VQAv2 normaliser (Antol et al., arXiv:1505.00468), not equal to it (ours): every mark that is
    not part of a number or a word becomes a space, no contraction table, number words up to twenty, and an answer
    that consists of an article alone stays as it is (the official rule turns ``A`` into the empty string).

    >>> normalise_answer("The red star.")
    'red star'
    >>> normalise_answer("Three")
    '3'
    """
    words = [word for word in (_strip_marks(word) for word in _NOT_WORD.sub(" ", text.lower()).split()) if word]
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_NUMBER_WORDS.get(word, word) for word in kept)


def _strip_marks(word: str) -> str:
    """``.`` and ``'`` stay inside a word only: ``3.5`` and ``don't`` keep theirs, ``end.`` loses it."""
    return word.strip("'").rstrip(".") if re.match(r"\.\d", word) else word.strip(".'")


def exact_match(answer: str, gold: str | list[str] | tuple[str, ...]) -> bool:
    """Whether the answer equals the gold answer, or one of several accepted ones, after `normalise_answer`."""
    accepted = [gold] if isinstance(gold, str) else gold
    return normalise_answer(answer) in {normalise_answer(text) for text in accepted}


def num_words(text: str) -> int:
    """Words separated by white space."""
    return len(text.split())


def word_f1(answer: str, gold: str) -> float:
    """Harmonic mean of the precision and recall of words, each counted as often as it occurs; in [0, 1].

    SQuAD's F1 (Rajpurkar et al., arXiv:1606.05250) with `normalise_answer`; 1 if both are empty.
    """
    said, wanted = Counter(normalise_answer(answer).split()), Counter(normalise_answer(gold).split())
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())
