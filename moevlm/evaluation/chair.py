"""CHAIR (arXiv:1809.02156): how often a description names objects that are not in the image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moevlm.metrics.text import num_words

Row = Mapping[str, Any]


def score_chair(rows: Sequence[Row], extract: Callable[[str], Sequence[str]] | None = None) -> dict[str, float]:
    """Faithfulness of descriptions, from rows ``{answer, objects[, mentioned]}``.

    With M mentions (what `extract` returns, repeats included) of which H name an object that is not there:
    ``chair_i`` = H / M over all descriptions; ``chair_s`` = descriptions with a hallucination / descriptions;
    ``chair_s_mentioning`` = the same over descriptions with a mention (the "Resp" of Object HalBench);
    ``recall`` = different true objects mentioned / true objects, over all descriptions; ``mean_words`` the mean length.
    Lower CHAIR bought by saying less shows in the last two. 0 where a denominator is 0.

    Args:
        rows: ``objects`` are the names of what is in the image, in the extractor's vocabulary.
        extract: names mentioned in a text; without it, each row's own ``mentioned``.

    Raises:
        ValueError: there are no rows, or neither an extractor nor mentions.
    """
    if not rows:
        raise ValueError("no rows to score: the benchmark is empty or its limit is 0")
    num_mentions = num_wrong = num_hallucinating = num_mentioning = num_found = num_objects = 0
    for row in rows:
        mentions, objects = _mentions(row, extract), set(row["objects"])
        wrong = [name for name in mentions if name not in objects]
        num_mentions += len(mentions)
        num_wrong += len(wrong)
        num_hallucinating += bool(wrong)
        num_mentioning += bool(mentions)
        num_found += len(objects.intersection(mentions))
        num_objects += len(objects)
    return {
        "chair_i": _ratio(num_wrong, num_mentions),
        "chair_s": num_hallucinating / len(rows),
        "chair_s_mentioning": _ratio(num_hallucinating, num_mentioning),
        "recall": _ratio(num_found, num_objects),
        "mean_words": sum(num_words(row["answer"]) for row in rows) / len(rows),
        "num_mentions": num_mentions,
        "num_rows": len(rows),
    }


def _mentions(row: Row, extract: Callable[[str], Sequence[str]] | None) -> Sequence[str]:
    if extract is not None:
        return extract(row["answer"])
    if row.get("mentioned") is None:
        raise ValueError(f"row {row.get('id')!r} holds no `mentioned` objects and no extractor was given")
    return row["mentioned"]


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
