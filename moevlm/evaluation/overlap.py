"""Descriptions without object annotations: how much of the gold text's wording is there."""

from collections.abc import Mapping, Sequence
from typing import Any

from moevlm.metrics.text import num_words, word_f1

Row = Mapping[str, Any]


def score_overlap(rows: Sequence[Row]) -> dict[str, float]:
    """``word_f1``, the mean over rows ``{answer, gold}``, of several gold texts the best, and ``mean_words``.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to score: the benchmark is empty or its limit is 0")
    best = [max(word_f1(row["answer"], gold) for gold in _golds(row)) for row in rows]
    return {
        "word_f1": sum(best) / len(rows),
        "mean_words": sum(num_words(row["answer"]) for row in rows) / len(rows),
        "num_rows": len(rows),
    }


def _golds(row: Row) -> Sequence[str]:
    return [row["gold"]] if isinstance(row["gold"], str) else row["gold"]
