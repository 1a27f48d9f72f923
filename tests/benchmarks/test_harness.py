"""What a benchmark refuses to time, and what it says then."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moevlm.benchmarks.harness import Case, Contender, Result, Work, relative_error, run_cases
from moevlm.benchmarks.machine import Ceilings, measure_ceilings
from moevlm.benchmarks.suites import run_suite

CPU = torch.device("cpu")
TRUTH = {"sum": torch.tensor([3.0, 4.0])}


def waiting(seconds: float, found: Tensor) -> Work:
    return Work(lambda: time.sleep(seconds), lambda: {"sum": found}, {"token": 10.0})


def absent() -> Work:
    import no_such_package  # type: ignore[import-not-found]  # noqa: F401

    raise AssertionError


def measure(*contenders: Contender, floor: str | None = None, **options: object) -> dict[str, Result]:
    case = Case("case", list(contenders), floor or (lambda ceilings: 0.01), reference=lambda: TRUTH, tolerance=0.01)
    given = {"warmup": 0, "repeats": 3, **options}
    found = run_cases([case], device=CPU, ceilings=Ceilings(1e9, 1e9), **given)  # type: ignore[arg-type]
    return {result.contender: result for result in found}


def test_ratios_are_taken_over_the_floor() -> None:
    slow = Contender("slow", lambda: waiting(0.02, TRUTH["sum"]))
    result = measure(Contender("quick", lambda: waiting(0.01, TRUTH["sum"])), slow, floor="quick")
    assert result["quick"].ratio == 1.0
    assert 1.2 < result["slow"].ratio < 4
    assert result["slow"].rates["token"] == pytest.approx(10 / result["slow"].seconds)
    assert measure(slow)["slow"].ratio == pytest.approx(result["slow"].seconds / 0.01, rel=0.5)


def test_a_wrong_contender_is_not_timed() -> None:
    steps = []
    work = Work(lambda: steps.append(1), lambda: {"sum": TRUTH["sum"] * 1.1})
    result = measure(Contender("wrong", lambda: work))["wrong"]
    assert (result.status, result.seconds, steps) == ("wrong", None, [])
    assert result.why == "relative error sum 0.1, allowed 0.01"


def test_a_contender_that_is_not_installed_says_so_and_the_next_one_is_measured() -> None:
    result = measure(Contender("absent", absent), Contender("next", lambda: waiting(0.0, TRUTH["sum"])))
    assert result["absent"].status == "not run"
    assert result["absent"].why == "ModuleNotFoundError: No module named 'no_such_package'"
    assert result["next"].status == "ok"


def test_only_measures_what_is_named_and_the_floor() -> None:
    three = [Contender(name, lambda: waiting(0.0, TRUTH["sum"])) for name in ("floor", "one", "two")]
    assert list(measure(*three, floor="floor", only="case/two")) == ["floor", "two"]
    assert list(measure(*three, floor="floor", only="case", skip="two")) == ["floor", "one"]
    assert list(measure(*three, floor="floor", only="case/one|/two", skip="none|two")) == ["floor", "one"]


def test_a_long_step_is_repeated_three_times_at_least() -> None:
    assert measure(Contender("x", lambda: waiting(0.01, TRUTH["sum"])), repeats=9, most_seconds=0.0)["x"].repeats == 3


def test_relative_error_of_another_shape_or_nan_is_infinite() -> None:
    assert relative_error(torch.ones(2), torch.ones(3)) == math.inf
    assert relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert relative_error(torch.tensor([3.0, 5.0]), TRUTH["sum"]) == pytest.approx(0.2)


def test_ceilings_are_positive() -> None:
    ceilings = measure_ceilings(CPU, torch.float32)
    assert ceilings.flop_per_second > 1e8
    assert ceilings.bytes_per_second > 1e7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "moe"}, "unknown suite 'moe'; known: moe_layer.*set suite"),
        ({"size": "huge"}, "unknown size 'huge'; known: full, tiny; set size"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_an_unknown_choice_lists_the_known_ones(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_suite(**{"suite": "moe_layer", "size": "tiny", "device": "cpu", "output": tmp_path, **options})


def test_a_run_leaves_a_line_about_itself_and_one_for_each_result(tmp_path: Path) -> None:
    options = {"size": "tiny", "device": "cpu", "warmup": 0, "repeats": 1, "only": "balanced/fused"}
    results = run_suite("moe_layer", output=tmp_path, commit="abc", **options)
    about, *rows = [json.loads(line) for line in (tmp_path / "moe_layer.jsonl").read_text().splitlines()]
    assert (about["commit"], about["torch"], about["device_type"]) == ("abc", torch.__version__, "cpu")
    assert [row["contender"] for row in rows] == [result.contender for result in results]
