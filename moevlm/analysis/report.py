"""One page about a run: stages, scores and figures as self-contained HTML and as Markdown."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Scores = Mapping[str, Mapping[str, float]]

HEADLINES: tuple[tuple[str, ...], ...] = (
    ("f1", "accuracy", "precision", "recall", "yes_ratio", "unparsable_fraction"),
    ("chair_i", "chair_s", "recall", "mean_words", "perplexity"),
    ("word_f1", "mean_words", "perplexity"),
    ("accuracy", "accuracy_open", "accuracy_closed", "accuracy_phrasing_heldout", "perplexity"),
)
"""What a benchmark's table shows, the rest is folded away: the first of these whose first metric the benchmark has."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto }
table { font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { background: var(--soft) }
tr.chance td { font-style: italic; opacity: .75 }
figure { margin: 1.2rem 0 } figure img { max-width: 100%; background: white; border-radius: 6px }
figcaption, .note { opacity: .75; font-size: .9em } summary { cursor: pointer; opacity: .75 }
"""


def write_report(
    folder: str | Path,
    *,
    stages: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Scores],
    chance: Scores,
    figures: Sequence[str | Path],
    title: str = "moevlm report",
    notes: Sequence[str] = (),
) -> Path:
    """Write ``report.html`` (figures embedded) and ``report.md`` (figures linked) into `folder`.

    Args:
        folder: made if it does not exist.
        stages: rows of the stage table, e.g. name, steps, seconds, loss_first, loss_last, checkpoint.
        evaluation: scores by model, benchmark and metric.
        chance: scores by benchmark and metric of answering without the image; the last row of each table.
        figures: PNG files.
        title: heading of the page.
        notes: plain sentences under the heading.

    Returns:
        Path of ``report.html``.

    Raises:
        ValueError: a figure does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [Path(figure) for figure in figures]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"no figure at {', '.join(missing)}; draw it first or leave it out of figures")
    tables = _benchmark_tables(evaluation, chance)
    (folder / "report.md").write_text(_markdown(folder, title, notes, stages, tables, paths))
    page = folder / "report.html"
    page.write_text(_html(title, notes, stages, tables, paths))
    return page


def _benchmark_tables(evaluation: Mapping[str, Scores], chance: Scores) -> dict[str, list[dict[str, Any]]]:
    """Benchmark -> rows {model, metric: value...}, the chance row last; metrics in headline order."""
    names = list(dict.fromkeys(name for scores in evaluation.values() for name in scores))
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        rows = [{"model": model} | dict(scores[name]) for model, scores in evaluation.items() if name in scores]
        if name in chance:
            rows.append({"model": "chance"} | dict(chance[name]))
        tables[name] = rows
    return tables


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Headline metrics and the others, as they occur."""
    metrics = list(dict.fromkeys(key for row in rows for key in row if key != "model"))
    known = next((names for names in HEADLINES if names[0] in metrics), None)
    headline = [name for name in known if name in metrics] if known else metrics[:6]
    return headline, [name for name in metrics if name not in headline]


def _markdown(
    folder: Path, title: str, notes: Sequence[str], stages: Sequence[Mapping[str, Any]],
    tables: Mapping[str, list[dict[str, Any]]], figures: Sequence[Path],
) -> str:  # fmt: skip
    lines = [f"# {title}", "", *(f"{note}\n" for note in notes)]
    if stages:
        lines += ["## Stages", "", *_markdown_table(stages, list(stages[0])), ""]
    if tables:
        lines += ["## Scores", ""]
    for name, rows in tables.items():
        headline, rest = _columns(rows)
        lines += [f"### {name}", "", *_markdown_table(rows, ["model", *headline]), ""]
        if rest:
            lines += ["<details><summary>all metrics</summary>", "", *_markdown_table(_transposed(rows, rest)), ""]
            lines += ["</details>", ""]
    if figures:
        lines += ["## Figures", ""]
    for path in figures:
        lines += [f"![{_caption(path)}]({os.path.relpath(path, folder)})", ""]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> list[str]:
    columns = columns or list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" + " ---: |" * (len(columns) - 1)]
    return lines + ["| " + " | ".join(_text(row.get(column)) for column in columns) + " |" for row in rows]


def _html(
    title: str, notes: Sequence[str], stages: Sequence[Mapping[str, Any]],
    tables: Mapping[str, list[dict[str, Any]]], figures: Sequence[Path],
) -> str:  # fmt: skip
    parts = [f"<h1>{html.escape(title)}</h1>", *(f'<p class="note">{html.escape(note)}</p>' for note in notes)]
    if stages:
        parts += ["<h2>Stages</h2>", _html_table(stages, list(stages[0]))]
    if tables:
        parts.append("<h2>Scores</h2>")
    for name, rows in tables.items():
        headline, rest = _columns(rows)
        parts += [f"<h3>{html.escape(name)}</h3>", _html_table(rows, ["model", *headline])]
        if rest:
            folded = _html_table(_transposed(rows, rest))
            parts.append(f"<details><summary>all metrics</summary>{folded}</details>")
    if figures:
        parts.append("<h2>Figures</h2>")
    for path in figures:
        data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img alt="{_caption(path)}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{_caption(path)}</figcaption></figure>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _html_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    columns = columns or list(rows[0])
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in columns)
    body = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(_text(row.get(column)))}</td>" for column in columns)
        body.append(f'<tr class="{"chance" if row.get("model") == "chance" else "row"}">{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _transposed(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row a metric, one column a model: many metrics are easier to read downwards."""
    return [{"metric": metric} | {row["model"]: row.get(metric) for row in rows} for metric in metrics]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
    return f"{int(value):,}" if isinstance(value, float) else str(value)


def _caption(path: Path) -> str:
    return html.escape(path.stem.replace("_", " ").capitalize())
