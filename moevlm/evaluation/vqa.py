"""Visual question answering by exact match, kind by kind."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moevlm.metrics.text import exact_match

Row = Mapping[str, Any]
YES_NO = frozenset({"yes", "no"})


def is_correct(row: Row) -> bool:
    """Exact match of ``answer`` with ``gold`` (a string, or several accepted ones) after normalisation."""
    return exact_match(row["answer"], row["gold"])


def is_open(row: Row) -> bool:
    """Whether the question is open: what the row's ``open`` says, else every question not answered yes or no."""
    if row.get("open") is not None:
        return bool(row["open"])
    gold = row["gold"] if isinstance(row["gold"], str) else row["gold"][0]
    return gold.strip().rstrip(".").lower() not in YES_NO


def score_vqa(rows: Sequence[Row]) -> dict[str, float]:
    """Exact-match accuracies of rows ``{kind, answer, gold[, text_only, open, phrasing]}``.

    ``accuracy`` is the macro mean over the kinds that need the image: every kind weighs the same, however many
    questions it has. Text-only questions are reported by kind and left out of every other figure. ``accuracy_micro``
    weighs every question the same; ``accuracy_open`` / ``accuracy_closed`` and ``accuracy_phrasing_*`` are macro means
    over kinds, too, within their part. A part without rows is absent.

    Returns:
        Fractions in [0, 1] by name, each with the number of its rows beside it as ``num_*``.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to score: the benchmark is empty or its limit is 0")
    visual = [row for row in rows if not row.get("text_only")]
    parts = {"": visual, "open": [row for row in visual if is_open(row)]}
    parts["closed"] = [row for row in visual if not is_open(row)]
    for phrasing in sorted({row["phrasing"] for row in visual if row.get("phrasing")}):
        parts[f"phrasing_{phrasing}"] = [row for row in visual if row.get("phrasing") == phrasing]
    scores: dict[str, float] = {}
    for name, part in parts.items():
        if part:
            scores["_".join(filter(None, ("accuracy", name)))] = _mean(accuracy_by_kind(part).values())
            scores["_".join(filter(None, ("num", name or "rows")))] = len(part)
    if visual:
        scores["accuracy_micro"] = _mean(map(is_correct, visual))
    for kind, accuracy in accuracy_by_kind(rows).items():
        scores[f"accuracy_kind_{kind}"] = accuracy
        scores[f"num_kind_{kind}"] = sum(row["kind"] == kind for row in rows)
    return scores


def accuracy_by_kind(rows: Iterable[Row]) -> dict[str, float]:
    """Exact-match accuracy of each kind, kinds sorted by name."""
    by_kind: dict[str, list[bool]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(is_correct(row))
    return {kind: _mean(by_kind[kind]) for kind in sorted(by_kind)}


def _mean(values: Iterable[float]) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)
