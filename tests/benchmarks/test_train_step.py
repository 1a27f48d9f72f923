"""Every way to take a step that is timed takes the same step."""

from __future__ import annotations

from pathlib import Path

import torch

from moevlm.benchmarks.memory import predicted_bytes
from moevlm.benchmarks.suites import run_suite
from moevlm.benchmarks.train_step import PROBLEMS, SIZES, build_model, draw_step


def run_eagerly(monkeypatch) -> None:
    """What is compiled runs as it is: the tests of execution compile."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)


def test_contenders_that_run_on_a_cpu_agree_with_the_reference(tmp_path: Path, monkeypatch) -> None:
    run_eagerly(monkeypatch)
    results = run_suite("train_step", size="tiny", device="cpu", output=tmp_path, warmup=0, repeats=1)
    assert all(result.status == "ok" for result in results), [(r.case, r.contender, r.why) for r in results]
    assert all({"loss", "connector", "first", "last"} == set(result.errors) for result in results)
    assert sum(result.contender.startswith("transformers") for result in results) == 1


def test_a_step_is_drawn_as_described() -> None:
    sizes = SIZES["full"]
    batches = draw_step(sizes, num_visual=576, device=torch.device("cpu"))
    lengths = [length + 575 for batch in batches for length in batch.lengths]
    assert len(lengths) == sizes.samples == sum(batch.num_images for batch in batches)
    assert all(600 <= length <= 2600 for length in lengths)
    assert 10_000 < sum(lengths) / len(batches) < 14_000
    assert 0.15 < sum(batch.num_targets for batch in batches) / sum(lengths) < 0.25


def test_any_number_of_micro_batches_holds_the_same_sequences() -> None:
    sizes = SIZES["full"]
    one, two = (draw_step(sizes, num_visual=576, micro_batches=number, device=torch.device("cpu")) for number in (1, 2))
    assert (len(one), len(two)) == (1, 2)
    assert sorted(one[0].lengths) == sorted(length for batch in two for length in batch.lengths)
    assert one[0].num_targets == sum(batch.num_targets for batch in two)


def test_the_prediction_holds_what_a_step_holds() -> None:
    lengths = (40, 30)
    dense, sparse = (build_model(problem, SIZES["tiny"], torch.device("cpu")) for problem in PROBLEMS[:2])
    for model in (dense, sparse):
        found = predicted_bytes(model, lengths, num_targets=10, num_images=2)
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        assert found["parameters"] == sum(parameter.nbytes for parameter in model.parameters())
        assert (found["gradients"], found["moments"]) == (trained, 2 * trained)
    kept = [predicted_bytes(model, lengths, 10, 2)["activations"] for model in (dense, sparse)]
    width, inner, layers = 32, 48, 4
    assert kept[0] == 2 * layers * (8 * width + 3 * inner) * sum(lengths)
    assert kept[1] - kept[0] == 2 * (layers // 2) * (3 * inner + 4 * width) * sum(lengths)


def test_the_sparse_problem_trains_what_moe_tuning_trains() -> None:
    model = build_model(PROBLEMS[1], SIZES["tiny"], torch.device("cpu"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("router" in name for name in trained)
    assert all("mlp" in name or name.startswith("connector") for name in trained)
    assert len(model.moe_layers) == 2
