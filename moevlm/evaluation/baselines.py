"""What can be had without looking: constant answers, somebody else's caption, and the table that shows it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moevlm.metrics.text import normalise_answer

Row = Mapping[str, Any]


def majority_answers(rows: Sequence[Row]) -> dict[str, str]:
    """The most frequent gold answer of each kind, ties by the alphabet.

    From training rows this is a real baseline; from the test rows themselves the strongest constant there can be.
    """
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["kind"], Counter())[normalise_answer(_first(row["gold"]))] += 1
    return {kind: min(counter, key=lambda text: (-counter[text], text)) for kind, counter in sorted(counts.items())}


def constant_rows(rows: Sequence[Row], answers_by_kind: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows as if a model had given its kind's constant answer to each; a kind without one is answered by ''."""
    return [dict(row) | {"answer": answers_by_kind.get(row["kind"], "")} for row in rows]


def same_answer_rows(rows: Sequence[Row], answer: str) -> list[dict[str, Any]]:
    """The rows as if a model had given the same answer to each, e.g. yes to every POPE probe."""
    return [dict(row) | {"answer": answer} for row in rows]


def swapped_rows(rows: Sequence[Row], *, seed: int = 0) -> list[dict[str, Any]]:
    """The rows, each answered by the gold answer of another one: faithful descriptions of the wrong image.

    A seeded cyclic shift of a random order, so that with two rows or more none keeps its own. ``mentioned`` objects
    become those of the other gold answer (``gold_mentioned``).
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    donors = np.empty_like(order)
    donors[order] = np.roll(order, 1)
    return [
        dict(row) | {"answer": _first(rows[donor]["gold"]), "mentioned": rows[donor].get("gold_mentioned")}
        for row, donor in zip(rows, donors)
    ]


def above_chance(
    scores: Mapping[str, Mapping[str, float]], chance: Mapping[str, Mapping[str, float]], metrics: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Rows {benchmark, metric, value, chance, difference} of the chosen metric of each benchmark that both know."""
    table = []
    for benchmark, metric in metrics.items():
        if metric in scores.get(benchmark, {}) and metric in chance.get(benchmark, {}):
            value, blind = scores[benchmark][metric], chance[benchmark][metric]
            row = {"benchmark": benchmark, "metric": metric, "value": value, "chance": blind}
            table.append(row | {"difference": value - blind})
    return table


def _first(gold: str | Sequence[str]) -> str:
    return gold if isinstance(gold, str) else gold[0]
