"""Several seeds of one chain on one page: means and standard deviations, comparisons, cost, forgetting.

python -m experiments.seed_table folders=[outputs/modular/seed_0,outputs/modular/seed_1] output=outputs/modular/table.md
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.instantiate import plain
from experiments.program import program
from experiments.run_folder import read_json
from moevlm.evaluation.answers import compare_answers_of_seeds

SCORES = (
    ("VQA", "vqa", "accuracy"),
    ("VQA, open", "vqa", "accuracy_open"),
    ("POPE accuracy", "pope", "accuracy"),
    ("CHAIR_i", "descriptions", "chair_i"),
    ("object recall", "descriptions", "recall"),
    ("words", "descriptions", "mean_words"),
)
"""Column, benchmark, metric."""

Summary = dict[str, Any]


def write_table(folders: Sequence[Path], output: Path) -> Path:
    """Write the page from what the run folders hold; nothing is computed anew but the comparisons.

    Raises:
        ValueError: a folder without a summary, or with other stages than the first.
    """
    summaries = [read_summary(folder) for folder in folders]
    for folder, summary in zip(folders, summaries):
        if _names(summary) != _names(summaries[0]):
            raise ValueError(
                f"{folder} has stages {_names(summary)}, {folders[0]} has {_names(summaries[0])}; "
                "set folders to seeds of one chain"
            )
    made = read_json(folders[0] / _names(summaries[0])[0] / "environment.json")
    parts = [
        f"Mean +- standard deviation of {', '.join(map(str, folders))}; commit {made.get('commit', 'unknown')}, "
        f"{', '.join(made.get('gpus') or ['no GPU'])}."
    ]
    parts += [stage_table(summaries), score_table(summaries), comparison_table(folders, summaries)]
    parts += [weight_table(folders, summaries), forgetting_table(summaries)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n\n".join(filter(None, parts)) + "\n")
    return output


def read_summary(folder: Path) -> Summary:
    """What a finished chain left.

    Raises:
        ValueError: it is not finished, or no chain.
    """
    summary = read_json(folder / "summary.json")
    if not summary:
        raise ValueError(f"no summary.json in {folder}; run that chain to its end, or set folders")
    return summary


def stage_table(summaries: Sequence[Summary]) -> str:
    """What each stage cost and reached. A program's time is its longest: the other seeds find a cache written."""
    rows = []
    for number, stage in enumerate(summaries[0]["stages"]):
        of_seeds = [summary["stages"][number] for summary in summaries]
        values = [
            [row.get(key) for row in of_seeds] for key in ("seconds", "peak_memory_gib", "loss_first", "loss_last")
        ]
        cells = [spread(found, digits) for found, digits in zip(values, (0, 2, 3, 3))]
        rows.append([stage["name"], f"{stage['steps']:,}", *cells])
    for name, row in summaries[0].get("programs", {}).items():
        seconds = max(summary["programs"][name]["seconds"] for summary in summaries)
        rows.append([f"{name} ({row['program']})", "", f"{seconds:.0f}", "", "", ""])
    return table(["stage", "steps", "seconds", "peak GiB", "val/loss before", "after"], rows)


def score_table(summaries: Sequence[Summary]) -> str:
    """What `SCORES` names, of every model that was evaluated."""
    rows = []
    for name in sorted(summaries[0]["eval"], key=_place_in(summaries[0])):
        of_seeds = [summary["eval"][name] for summary in summaries]
        found = [[scores.get(benchmark, {}).get(metric) for scores in of_seeds] for _, benchmark, metric in SCORES]
        rows.append([name, *(spread(values, 1 if key[0] == "words" else 3) for values, key in zip(found, SCORES))])
    return table(["model", *(column for column, _, _ in SCORES)], rows)


def comparison_table(folders: Sequence[Path], summaries: Sequence[Summary]) -> str:
    """Differences in the share of right answers to the same VQA questions, whose kinds are not balanced."""
    rows = []
    compared, place = summaries[0].get("comparisons", {}), _place_in(summaries[0])
    for pair in sorted(compared, key=lambda pair: place(pair.split(" - ")[0])):
        model_a, model_b = pair.split(" - ")
        files = [[folder / "eval" / name / "answers/vqa.jsonl" for name in (model_a, model_b)] for folder in folders]
        pooled = compare_answers_of_seeds([(a, b) for a, b in files])
        each = ", ".join(f"{100 * summary['comparisons'][pair]['difference']:+.1f}" for summary in summaries)
        interval = f"{100 * pooled.low:+.1f} to {100 * pooled.high:+.1f}"
        mark = "yes" if pooled.excludes_zero else "no"
        rows.append([pair, f"{100 * pooled.difference:+.1f}", interval, mark, each, str(compared[pair]["num_rows"])])
    return table(
        ["right answers, VQA, points", "difference", "95 % over questions", "excludes 0", "by seed", "questions"], rows
    )


def weight_table(folders: Sequence[Path], summaries: Sequence[Summary]) -> str:
    """Where the weights of kd and lm ended, of the stages that log both: fixed ones beside adaptive ones."""
    rows = []
    for name in _names(summaries[0]):
        last = [_last_weights(folder / name / "metrics.jsonl") for folder in folders]
        if all({"kd", "lm"} <= weights.keys() for weights in last):
            rows.append([name, *(spread([weights[key] for weights in last], 3) for key in ("kd", "lm"))])
    return table(["stage", "kd_weight at the end", "lm_weight at the end"], rows)


def forgetting_table(summaries: Sequence[Summary]) -> str:
    """Losses of each domain before and after each stage, and the change; positive is forgotten."""
    rows, domains = [], []
    report = summaries[0].get("forgetting", {})
    for name in sorted(report, key=_place_in(summaries[0])):
        domains = list(report[name])
        cells = []
        for domain in domains:
            of_seeds = [summary["forgetting"][name][domain] for summary in summaries]
            before, after = (statistics.fmean(row[key] for row in of_seeds) for key in ("before", "after"))
            change = spread([row["change"] for row in of_seeds], 3, sign="+")
            cells.append(f"{before:.3f} to {after:.3f} ({change})")
        rows.append([name, *cells])
    return table(["stage, nats a token", *domains], rows)


def spread(values: Sequence[float | None], digits: int, *, sign: str = "") -> str:
    """Mean and sample standard deviation; the value alone where there is one, nothing where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return ""
    mean = f"{statistics.fmean(known):{sign},.{digits}f}"
    return mean if len(known) == 1 else f"{mean} +- {statistics.stdev(known):,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; empty without rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _place_in(summary: Summary) -> Callable[[str], int]:
    """Where a name stands in the chain, of which a summary's mappings know nothing; others come last."""
    places = {name: place for place, name in enumerate(_names(summary))}
    return lambda name: places.get(name, len(places))


def _names(summary: Summary) -> list[str]:
    return [stage["name"] for stage in summary["stages"]]


def _last_weights(record: Path) -> dict[str, float]:
    """The weight of each loss in the last row that has it."""
    weights: dict[str, float] = {}
    for line in record.read_text().splitlines() if record.exists() else []:
        for key, value in json.loads(line).items():
            if key.startswith("train/") and key.endswith("_weight"):
                weights[key.removeprefix("train/").removesuffix("_weight")] = value
    return weights


@program("seed_table")
def main(cfg: DictConfig) -> None:
    settings = plain(cfg)
    output = write_table([Path(folder) for folder in settings["folders"]], Path(settings["output"]))
    print(output.read_text())
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
