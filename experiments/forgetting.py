"""The forgetting report of a chain: every domain's loss before and after each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.run_folder import read_json, write_json
from moevlm.evaluation.domain_losses import domain_losses

Report = dict[str, dict[str, dict[str, float]]]


def forgetting_chain(settings: Mapping[str, Any], root: Path) -> Report:
    """Losses of the domains that ``forgetting.domains`` names, in nats a supervised token.

    A stage is compared with its start, or with what ``forgetting.before`` names for it; stages with neither have no
    row. Losses of a model are computed once, and kept in ``<stage>/domain_losses.json``.

    Returns:
        Stage -> domain -> before, after, change (positive: forgotten).
    """
    chosen = settings["forgetting"]
    if chosen is None:
        return {}
    report: Report = {}
    for name, before in pairs_of(settings).items():
        pair = [run_losses(root / run, chosen) for run in (before, name)]
        report[name] = {
            domain: {"before": pair[0][domain], "after": pair[1][domain], "change": pair[1][domain] - pair[0][domain]}
            for domain in chosen["domains"]
        }
    _print(report, list(chosen["domains"]))
    return report


def pairs_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Stages that the report compares, each with the one it is compared with."""
    if settings["forgetting"] is None:
        return {}
    given = settings["forgetting"].get("before", {})
    trained = [stage for stage in settings["stages"] if stage.get("program", "train") == "train"]
    found = {stage["name"]: given.get(stage["name"], stage.get("start")) for stage in trained}
    return {name: before for name, before in found.items() if before is not None}


def run_losses(run: Path, chosen: Mapping[str, Any]) -> dict[str, float]:
    """Losses of a run's model in the domains of `chosen`, computed once.

    Args:
        chosen: the pipeline's ``forgetting``.
    """
    domains = chosen["domains"]
    options = {key: value for key, value in chosen.items() if key not in ("domains", "before")}
    asked = {"domains": dict(domains), "modified": (run / "model" / "config.json").stat().st_mtime, **options}
    stored = read_json(run / "domain_losses.json")
    if stored.get("asked") != asked:
        stored = {"asked": asked, "losses": domain_losses(run / "model", domains, **options)}
        write_json(run / "domain_losses.json", stored)
    return {str(name): float(value) for name, value in stored["losses"].items()}


def _print(report: Report, domains: Sequence[str]) -> None:
    table = Table("stage", *domains, title="nats a token, before -> after (change)")
    for stage, rows in report.items():
        cells = [rows[name] for name in domains]
        table.add_row(stage, *(f"{c['before']:.3f} -> {c['after']:.3f} ({c['change']:+.3f})" for c in cells))
    Console().print(table)
