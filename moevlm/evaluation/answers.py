"""Answer files: one JSON object a line, everything that a score needs, so that scoring never needs the model again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moevlm.evaluation import pope, vqa
from moevlm.evaluation.baselines import constant_rows, majority_answers, same_answer_rows, swapped_rows
from moevlm.evaluation.chair import score_chair
from moevlm.evaluation.comparison import PairedDifference, pair_by_id, paired_bootstrap
from moevlm.evaluation.overlap import score_overlap
from moevlm.evaluation.perplexity import score_perplexity

Row = dict[str, Any]
Scores = dict[str, dict[str, float]]
Extractor = Callable[[str], Sequence[str]]

SCORERS: dict[str, Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]] = {
    "vqa": vqa.score_vqa,
    "pope": pope.score_pope,
    "chair": score_chair,
    "overlap": score_overlap,
}
CORRECT: dict[str, Callable[[Mapping[str, Any]], bool]] = {"vqa": vqa.is_correct, "pope": pope.is_correct}


def write_answers(file: str | Path, rows: Sequence[Row]) -> Path:
    """Write rows as JSON lines; the file appears under its name only when complete."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
    return path


def read_answers(file: str | Path) -> list[Row]:
    """Rows of an answer file.

    Raises:
        ValueError: it is missing, not JSON lines, or answers a row id twice.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no answer file at {path}; run experiments.evaluate first")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a file of JSON lines ({error.msg}); write it anew") from error
    ids = [row["id"] for row in rows]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path} answers {len(ids) - len(set(ids))} row ids twice; write it anew")
    return rows


def score_rows(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of one benchmark by the scorer that its rows name, and the perplexity of gold answers where known.

    Raises:
        ValueError: no rows, rows of several scorers, or an unknown scorer.
    """
    return SCORERS[_scorer(rows)](rows) | score_perplexity(rows)


def score_answers(folder: str | Path) -> Scores:
    """Scores of every ``<benchmark>.jsonl`` in a folder of answers, by benchmark.

    Raises:
        ValueError: there is none.
    """
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise ValueError(f"no answer files in {folder}; give the answers/ folder of an evaluation")
    return {file.stem: score_rows(read_answers(file)) for file in files}


def chance_scores(folder: str | Path, *, training_rows: Sequence[Mapping[str, Any]] | None = None) -> Scores:
    """What the benchmarks of a folder of answers give without an image, whatever the model answered there.

    vqa: the most frequent gold answer of each kind, from `training_rows` (kind, gold), or without them from the test
    rows themselves, which is the strongest constant; pope: always yes; chair and overlap: the gold text of another row.
    """
    scores = {}
    for file in sorted(Path(folder).glob("*.jsonl")):
        rows = [{key: value for key, value in row.items() if key != "num_gold_tokens"} for row in read_answers(file)]
        scorer = _scorer(rows)
        if scorer == "vqa":
            rows = constant_rows(rows, majority_answers(training_rows or rows))
        elif scorer == "pope":
            rows = same_answer_rows(rows, "yes")
        else:
            rows = swapped_rows(rows)
        scores[file.stem] = SCORERS[scorer](rows)
    return scores


def compare_answers(
    file_a: str | Path, file_b: str | Path, *, num_resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Paired bootstrap of the share of right answers, a minus b, on the questions of both; text-only ones left out.

    Raises:
        ValueError: the two files hold other questions, or a benchmark whose answers are not right or wrong.
    """
    return compare_answers_of_seeds([(file_a, file_b)], num_resamples=num_resamples, seed=seed)


def compare_answers_of_seeds(
    pairs: Sequence[tuple[str | Path, str | Path]], *, num_resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """As `compare_answers`, of models trained several times: a question's score is its mean over the pairs.

    Questions are drawn, and not answers: those of several seeds to one question are no independent samples, and taking
    them for such would make the interval too narrow. It says nothing of how seeds differ.

    Args:
        pairs: answer files of model a and model b, one pair for each seed.
        num_resamples: see `paired_bootstrap`.
        seed: see `paired_bootstrap`.

    Raises:
        ValueError: files hold other questions, or a benchmark whose answers are not right or wrong.
    """
    scores_a, scores_b = (_mean_scores([pair[side] for pair in pairs]) for side in (0, 1))
    return paired_bootstrap(*pair_by_id(scores_a, scores_b), num_resamples=num_resamples, seed=seed)


def _mean_scores(files: Sequence[str | Path]) -> dict[Any, float]:
    """Mean over the files of each question's score, by row id."""
    scores = [_right_or_wrong(file) for file in files]
    together = [pair_by_id(scores[0], other)[1] for other in scores]
    return {key: sum(values) / len(files) for key, values in zip(scores[0], zip(*together))}


def _right_or_wrong(file: str | Path) -> dict[Any, float]:
    rows = read_answers(file)
    scorer = _scorer(rows)
    if scorer not in CORRECT:
        raise ValueError(f"answers of {file} are not right or wrong (scorer {scorer}); known: {', '.join(CORRECT)}")
    return {row["id"]: float(CORRECT[scorer](row)) for row in rows if not row.get("text_only")}


def _scorer(rows: Sequence[Mapping[str, Any]]) -> str:
    names = {row["scorer"] for row in rows}
    if len(names) != 1 or not names <= SCORERS.keys():
        raise ValueError(f"rows of one benchmark must name one scorer of {', '.join(SCORERS)}, got {sorted(names)}")
    return str(names.pop())
