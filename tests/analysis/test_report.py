from pathlib import Path

import pytest
from PIL import Image

from moevlm.analysis.report import write_report

STAGES = [{"name": "moe_tuning", "steps": 300, "seconds": 61.5, "loss_first": 2.5, "loss_last": 1.25}]
SCORES = {
    "sparse": {"vqa": {"accuracy": 0.71234, "num_rows": 600}, "pope": {"f1": 0.8}},
    "dense": {"vqa": {"accuracy": 0.7}},
}
CHANCE = {"vqa": {"accuracy": 0.31, "num_rows": 600}}


def test_the_report_holds_tables_and_embedded_figures(tmp_path: Path) -> None:
    figure = tmp_path / "figures" / "expert_load.png"
    figure.parent.mkdir()
    Image.new("RGB", (8, 8)).save(figure)
    page = write_report(
        tmp_path / "out",
        stages=STAGES,
        evaluation=SCORES,
        chance=CHANCE,
        figures=[figure],
        title="demo <1>",
        notes=["n"],
    )
    text = page.read_text()
    assert page.name == "report.html"
    assert "demo &lt;1&gt;" in text
    assert "data:image/png;base64," in text
    assert 'src="http' not in text
    for expected in ("moe_tuning", "0.712", "0.310", "sparse", "dense", "chance"):
        assert expected in text
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "![Expert load](../figures/expert_load.png)" in markdown
    assert "| sparse | 0.712 |" in markdown


def test_each_kind_of_benchmark_shows_its_own_headlines(tmp_path: Path) -> None:
    scores = {"m": {"pope": {"accuracy": 0.5, "f1": 0.6, "f1_random": 0.7}, "vqa": {"accuracy": 0.5, "num_rows": 3}}}
    write_report(tmp_path, stages=[], evaluation=scores, chance={}, figures=[])
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| model | f1 | accuracy |" in lines
    assert "| model | accuracy |" in lines


def test_an_empty_report_is_a_page_still(tmp_path: Path) -> None:
    page = write_report(tmp_path, stages=[], evaluation={}, chance={}, figures=[])
    assert "<h1>" in page.read_text()


def test_a_missing_figure_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.png"):
        write_report(tmp_path, stages=[], evaluation={}, chance={}, figures=[tmp_path / "gone.png"])
