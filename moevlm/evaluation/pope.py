"""POPE (arXiv:2305.10355): yes/no probes for objects that are there and objects that are not."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
PROTOCOLS = ("llava", "strict")


def parse_yes_no(text: str) -> bool | None:
    """What an answer says: True for yes, False for no, None when it does not begin with either word.

    The first word counts, whatever its case and the marks around it: ``Yes, there is no dog`` is a yes.
    """
    first = re.search(r"\w+", text.lower())
    return None if first is None or first.group() not in ("yes", "no") else first.group() == "yes"


def parse_llava(text: str) -> bool:
    """LLaVA's rule (eval_pope.py), word for word: no if one of the words before the first full stop, commas removed and
    split at single spaces, is ``No``, ``no`` or ``not``; everything else is a yes, the empty answer included."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not any(word in ("No", "no", "not") for word in words)


def score_pope(rows: Sequence[Row], *, protocol: str = "llava") -> dict[str, float]:
    """Metrics of rows ``{split, answer, gold: "yes" | "no"}``, per split and as the mean over splits.

    Yes is the positive class: precision TP / (TP + FP), recall TP / (TP + FN), f1 their harmonic mean, yes_ratio =
    answers read as yes / all answers; 0 where a denominator is 0. ``f1`` without a split is the mean of the splits' f1,
    the number that papers call POPE. ``unparsable_fraction`` counts answers that begin with neither yes nor no.

    Args:
        rows: answers; ``split`` is e.g. random, popular or adversarial.
        protocol: "llava" reads answers as `parse_llava` does (comparable with published numbers); "strict" as
            `parse_yes_no`, where an unparsable answer is wrong: against a yes a missed one, against a no a false alarm.

    Raises:
        ValueError: no rows, an unknown protocol, or a gold answer other than yes and no.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if not rows:
        raise ValueError("no rows to score: the benchmark is empty or its limit is 0")
    scores: dict[str, float] = {}
    splits = sorted({row["split"] for row in rows})
    by_split = {split: _score_split([row for row in rows if row["split"] == split], protocol) for split in splits}
    for name in by_split[splits[0]]:
        if name != "num_rows":
            scores[name] = sum(part[name] for part in by_split.values()) / len(splits)
    scores["num_rows"] = len(rows)
    for split, part in by_split.items():
        scores.update({f"{name}_{split}": value for name, value in part.items()})
    return scores


def is_correct(row: Row, *, protocol: str = "llava") -> bool:
    """Whether the answer, read by the protocol, agrees with the gold one."""
    said = parse_llava(row["answer"]) if protocol == "llava" else parse_yes_no(row["answer"])
    return said is _gold(row)


def _score_split(rows: Sequence[Row], protocol: str) -> dict[str, float]:
    counts = {(gold, said): 0 for gold in (True, False) for said in (True, False)}
    num_yes = num_unparsable = 0
    for row in rows:
        gold, parsed = _gold(row), parse_yes_no(row["answer"])
        num_unparsable += parsed is None
        said = parse_llava(row["answer"]) if protocol == "llava" else parsed
        num_yes += said is True
        counts[gold, (not gold) if said is None else said] += 1
    precision = _ratio(counts[True, True], counts[True, True] + counts[False, True])
    recall = _ratio(counts[True, True], counts[True, True] + counts[True, False])
    return {
        "accuracy": (counts[True, True] + counts[False, False]) / len(rows),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": num_yes / len(rows),
        "unparsable_fraction": num_unparsable / len(rows),
        "num_rows": len(rows),
    }


def _gold(row: Row) -> bool:
    gold = parse_yes_no(row["gold"])
    if gold is None:
        raise ValueError(f"gold answer of row {row.get('id')!r} must be yes or no, got {row['gold']!r}")
    return gold


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
