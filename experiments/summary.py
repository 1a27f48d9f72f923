"""The end of a chain: every model evaluated, one explained, all of it on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from experiments.run_folder import read_json, write_json
from experiments.tracking import show_figures
from moevlm.analysis.explain import analyze_folder
from moevlm.analysis.report import write_report
from moevlm.evaluation.answers import chance_scores, compare_answers
from moevlm.evaluation.evaluate import evaluate_folder

Scores = dict[str, dict[str, float]]

HEADLINES = {"vqa": "accuracy", "pope": "accuracy", "descriptions": "recall"}
"""The metric of each benchmark that decides which answer without the image is the better one."""

COLUMNS = (("vqa", "accuracy"), ("pope", "accuracy"), ("descriptions", "chair_i"), ("descriptions", "recall"))
"""What the closing table shows."""

CHAIN_KEYS = ("models", "folders", "blind", "compare", "random_routing")
"""Keys of ``evaluate`` that say what is evaluated; the others are arguments of `evaluate_folder`."""


def evaluate_chain(settings: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Evaluate the stages and folders that ``evaluate`` names, each once; a finished evaluation is read, not run again.

    Returns:
        ``eval`` (scores by model, benchmark, metric), ``chance`` (the blind model or the majority answer, whichever is
        higher) and ``comparisons`` (paired bootstrap of the pairs that ``evaluate.compare`` names).
    """
    evaluate = settings["evaluate"]
    if evaluate is None:
        return {"eval": {}, "chance": {}}
    chosen = evaluations(settings, root)
    scores: dict[str, Scores] = {}
    for name, (model, _, options) in chosen.items():
        scores[name] = evaluate_model(model, root / "eval" / name, settings["data_root"], options)
    first = next(iter(chosen))
    chance = chance_scores(root / "eval" / first / "answers")
    if evaluate.get("blind") is not None:
        chance = higher_chance(chance, scores[evaluate["blind"]])
    return {"eval": scores, "chance": chance, "comparisons": compare_chain(evaluate.get("compare", []), root)}


def evaluations(settings: Mapping[str, Any], root: Path) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """What ``evaluate`` asks for: name -> model folder, the stage or entry of ``evaluate.folders`` that it is of, and
    the options of `evaluate_folder`."""
    evaluate = settings["evaluate"]
    if evaluate is None:
        return {}
    options = {key: value for key, value in evaluate.items() if key not in CHAIN_KEYS}
    models = {name: str(root / name / "model") for name in evaluate["models"]} | evaluate.get("folders", {})
    found = {name: (model, name, options) for name, model in models.items()}
    for name in _names(evaluate.get("random_routing")):
        if name not in models:
            raise ValueError(f"random_routing has {name!r}, evaluated are {list(models)}; set evaluate.random_routing")
        found[f"{name}_random_routing"] = (models[name], name, {**options, "routing": "random"})
    return found


def _names(value: str | Sequence[str] | None) -> list[str]:
    """None, one name or several, as a list."""
    return [value] if isinstance(value, str) else list(value or [])


def evaluate_model(model: str, target: Path, data_folder: str, options: Mapping[str, Any]) -> Scores:
    """Scores of one model folder, from ``scores.json`` when this very evaluation was run before."""
    asked = {"model": model, "model_modified": (Path(model) / "config.json").stat().st_mtime, **options}
    if read_json(target / "asked.json") == asked:
        return read_json(target / "scores.json")
    print(f"evaluating {target.name}", flush=True)
    scores = evaluate_folder(model, data_folder=data_folder, output_folder=target, **options)
    write_json(target / "asked.json", asked)
    return scores


def higher_chance(majority: Scores, blind: Scores) -> Scores:
    """For each benchmark the scores of whichever is better without the image, by the headline metric."""
    chosen = {}
    for benchmark, scores in majority.items():
        metric = HEADLINES.get(benchmark, "")
        other = blind.get(benchmark, {})
        better = other.get(metric, 0.0) > scores.get(metric, 0.0)
        chosen[benchmark] = other if metric in other and better else scores
    return chosen


def compare_chain(pairs: Sequence[Sequence[str]], root: Path) -> dict[str, dict[str, Any]]:
    """Accuracy of model a minus model b on the same questions, with its 95 % interval."""
    found = {}
    for model_a, model_b in pairs:
        answers = [root / "eval" / name / "answers" / "vqa.jsonl" for name in (model_a, model_b)]
        found[f"{model_a} - {model_b}"] = compare_answers(*answers)._asdict()
    return found


def explain_chain(settings: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Draw the routing figures of the model that ``analyze.stage`` names, and show them in that run in W&B."""
    analyze = settings["analyze"]
    if analyze is None:
        return {"figures": []}
    options = {key: value for key, value in analyze.items() if key != "stage"}
    model, target = root / analyze["stage"] / "model", root / "figures"
    figures = analyze_folder(model, data_folder=settings["data_root"], output_folder=target, **options)
    show_figures(root / analyze["stage"], figures)
    return {"figures": [str(figure) for figure in figures]}


def report_chain(root: Path, summary: Mapping[str, Any]) -> str:
    """Write the page and print the closing table.

    Returns:
        Path of the report.
    """
    notes = [
        f"{pair}: {row['difference']:+.3f} accuracy, 95 % interval [{row['low']:+.3f}, {row['high']:+.3f}], "
        f"{row['num_rows']} questions"
        for pair, row in summary.get("comparisons", {}).items()
    ]
    for stage, rows in summary.get("forgetting", {}).items():
        changes = ", ".join(f"{name} {row['before']:.3f} to {row['after']:.3f}" for name, row in rows.items())
        notes.append(f"{stage}, nats a token before and after: {changes}")
    table = Table(
        Column("model", no_wrap=True), *(f"{benchmark} {metric}" for benchmark, metric in COLUMNS), title=root.name
    )
    for name, scores in [*summary["eval"].items(), ("without the image", summary["chance"])]:
        values = [scores.get(benchmark, {}).get(metric) for benchmark, metric in COLUMNS]
        table.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    Console().print(table)
    report = write_report(
        root,
        stages=summary["stages"],
        evaluation=summary["eval"],
        chance=summary["chance"],
        figures=summary["figures"],
        title=f"moevlm: {root.name}",
        notes=notes,
    )
    return str(report)
