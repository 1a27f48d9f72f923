"""Where teachers live, and that they stay what they are. The strategies of several ranks are in test_ranks.py."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from typing import Any

import pytest
import torch

from lightning_modules.mimic_distillation import MimicDistillation
from lightning_modules.on_policy import OnPolicy
from lightning_modules.several_teachers import split_by_teacher
from lightning_modules.teachers import TeacherOptions, has_same_vision
from moevlm.batch import TEACHER_VIEW
from moevlm.evaluation.regenerate import regenerate
from moevlm.models.offloading import stream_blocks
from moevlm.models.quantization import quantize_linears
from tests.lightning_modules.runs import (
    adamw,
    build_dense,
    build_sparse,
    build_teacher,
    fit,
    make_batch,
    make_stage,
    parameters_of,
    sgd,
)
from tests.tiny import tiny_batch, tiny_vlm


@pytest.mark.parametrize("build", [build_dense, build_sparse])
def test_a_streamed_model_says_the_same_and_its_weights_stay_on_the_host(build: Any) -> None:
    batch, vlm = make_batch(), build().requires_grad_(False).eval()
    expected = vlm(batch).hidden_states
    before = {name: value.clone() for name, value in vlm.named_parameters()}
    streamed = stream_blocks(vlm, "cpu")
    for _ in range(2):
        assert torch.equal(streamed(batch).hidden_states, expected)
    found = dict(streamed.named_parameters())
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_a_model_that_trains_is_not_streamed() -> None:
    with pytest.raises(ValueError, match="cannot be streamed"):
        stream_blocks(build_dense(), "cpu")


def test_an_offloaded_teacher_gives_the_same_step() -> None:
    results = []
    for placement in ("auto", "replicated", "offloaded"):
        stage = MimicDistillation(build_dense, build_teacher, sgd, teacher_options={"placement": placement})
        fit(stage, [make_batch(), make_batch(1)])
        results.append(parameters_of(stage))
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_eight_bits_are_close_to_the_teacher_and_take_less() -> None:
    pytest.importorskip("torchao")
    batch, vlm = make_batch(), build_teacher().eval()
    expected = vlm(batch).hidden_states
    found = quantize_linears(vlm, "int8")(batch).hidden_states
    assert not torch.equal(found, expected)
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    stage = MimicDistillation(
        build_dense, build_teacher, adamw, teacher_options={"quantization": "int8", "placement": "offloaded"}
    )
    exact = MimicDistillation(build_dense, build_teacher, adamw)
    losses = [fit(one, [batch]).callback_metrics["train/kd_loss"].item() for one in (stage, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"needs the library torchao.*quantization=null"):
        TeacherOptions.parse({"quantization": "int8"})


def test_options_without_meaning_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"placement": "cloud"}, "placement must be one of auto, sharded"),
        ({"quantization": "int3"}, "quantization must be one of int8"),
        ({"place": "auto"}, r"unknown teacher options \['place'\]"),
    ]
    for values, message in cases:
        with pytest.raises(ValueError, match=message):
            TeacherOptions.parse(values)
    stage = MimicDistillation(build_dense, build_teacher, adamw, teacher_options={"placement": "sharded"})
    with pytest.raises(ValueError, match="needs a sharded run"):
        fit(stage, [make_batch()])


def test_equal_frozen_vision_encoders_encode_an_image_once() -> None:
    counts, results = [], []
    for share in (True, False):
        stage = MimicDistillation(
            build_dense, build_dense, sgd, loss_weights={"lm": 1.0}, teacher_options={"share_vision": share}
        )
        calls: list[int] = []
        stage.teachers.builders["teacher"] = partial(_counted, stage.teachers.builders["teacher"], calls)
        fit(stage, [make_batch(), make_batch(1)])
        counts.append(len(calls))
        results.append(parameters_of(stage))
    assert counts == [0, 2]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def _counted(build: Any, calls: list[int]) -> Any:
    teacher = build()
    teacher.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    return teacher


def test_vision_is_shared_only_where_it_is_the_same() -> None:
    frozen, trained = ["^connector", "^language_model"], ["^vision_encoder"]
    assert has_same_vision(build_dense(), build_dense(hidden_size=48), frozen)
    assert not has_same_vision(build_dense(), build_dense(), trained)
    assert not has_same_vision(build_dense(), build_dense(seed=1), frozen)
    assert not has_same_vision(build_dense(), tiny_vlm(vision=None), frozen)


def test_a_teacher_with_a_view_of_its_own_looks_for_itself() -> None:
    batch = make_batch()
    other = dataclasses.replace(batch, images={**batch.images, TEACHER_VIEW: torch.zeros_like(batch.view("default"))})
    stage = MimicDistillation(build_dense, build_dense, adamw)
    assert fit(stage, [other]).callback_metrics["train/kd_loss"] > 1e-6


@torch.no_grad()
def test_two_evaluations_of_teacher_or_student_are_identical() -> None:
    """Both models have what is random in training; the teacher is asked while the student draws."""
    random = {"policy": "deepspeed", "capacity_factor": 0.5, "drop_order": "random", "sample_second_choice": True}
    build = partial(build_sparse, moe={**random, "jitter": 0.5}, attention_dropout=0.5)
    stage, batch = MimicDistillation(build, partial(build, seed=7), adamw), make_batch()
    with torch.enable_grad():
        fit(stage, [batch])
    found: dict[str, list[torch.Tensor]] = {"training": [], "teacher": [], "evaluation": []}
    for _ in range(2):
        student = stage.train().model(batch)
        found["training"].append(student.hidden_states)
        found["teacher"].append(stage.ask_teacher(batch, student).hidden_states)
        found["evaluation"].append(stage.eval().model(batch).hidden_states)
    assert {name: torch.equal(*pair) for name, pair in found.items()} == {
        "training": False,
        "teacher": True,
        "evaluation": True,
    }


def test_a_part_of_a_batch_is_the_batch_of_its_sequences() -> None:
    letters = ("siqqaa", "sqqa", "iqaqaa")
    whole, part = tiny_batch(letters, content_seed=3), tiny_batch(letters).select([2, 1])
    assert part.keys == ("sample2", "sample1")
    part = whole.select([1, 2])
    model = build_dense()
    outputs = model(whole), model(part)
    first = sum(outputs[0].lengths[:1])
    torch.testing.assert_close(outputs[1].hidden_states, outputs[0].hidden_states[first:])
    assert part.num_targets == 4
    assert part.num_images == 1
    assert part.lengths == (4, 6)


def test_every_sequence_is_taught_by_the_teacher_of_its_source() -> None:
    batch = dataclasses.replace(make_batch(), sources=torch.tensor([0, 1, 0, 1]))
    several = make_stage("several_teachers", optimizer=sgd, loss_weights={"load_balancing": 0.0})
    logged = fit(several, [batch]).callback_metrics
    total = 0.0
    for build, rows in ((build_teacher, [0, 2]), (partial(build_dense, seed=9), [1, 3])):
        part = batch.select(rows)
        alone = fit(MimicDistillation(build_sparse, build, sgd), [part]).callback_metrics
        total += alone["train/kd_loss"].item() * part.num_targets
    assert logged["train/kd_loss"].item() == pytest.approx(total / batch.num_targets, rel=1e-5)


def test_teachers_that_nobody_can_choose_between_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"build_teacher": None}, "a teacher is needed"),
        ({"build_teacher": None, "build_teachers": {"a": build_teacher}}, "come together"),
        (
            {"build_teacher": None, "build_teachers": {"a": build_teacher}, "teacher_of_source": ["b"]},
            r"names 'b', stage\.build_teachers has a",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            MimicDistillation(build_dense, optimizer=adamw, **options)


def test_a_batch_is_cut_by_the_teacher_of_each_source() -> None:
    batch = dataclasses.replace(make_batch(), sources=torch.tensor([0, 2, 1, 0]))
    parts = list(split_by_teacher(batch, ["b", "a", "b"]))
    assert [(teacher, part.keys, own) for teacher, part, own in parts] == [
        ("a", ("sample2",), True),
        ("b", ("sample0", "sample1", "sample3"), True),
    ]
    assert [own for *_, own in split_by_teacher(batch.select([0]), ["b", "a"])] == [False, True]
    with pytest.raises(ValueError, match=r"source 2, but stage\.teacher_of_source names the teachers of 2"):
        list(split_by_teacher(batch, ["a", "b"]))


def test_on_policy_steps_are_the_share_asked_for_and_the_same_on_every_rank() -> None:
    settings = OnPolicy.parse({"fraction": 0.3})
    drawn = [settings.is_drawn(seed=4, step=step) for step in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.3, abs=0.04)
    assert drawn == [settings.is_drawn(seed=4, step=step) for step in range(2000)]
    for none in (None, {"fraction": 0.0}):
        assert not any(OnPolicy.parse(none).is_drawn(seed=4, step=step) for step in range(100))
    for values in ({"max_new_tokens": 3}, {"fraction": 1.5}, {"fraction": 0.5, "share": 1}):
        with pytest.raises(ValueError, match=r"on_policy"):
            OnPolicy.parse(values)


def test_an_on_policy_step_learns_from_the_teacher_on_the_students_own_answers() -> None:
    """The first step of a run, against a step on the batch that the student's answers make."""
    batch, options = make_batch(), {"loss_weights": {"lm": 1.0}}
    stage = MimicDistillation(
        build_dense, build_teacher, sgd, on_policy={"fraction": 1.0, "max_new_tokens": 3, "temperature": 0.0}, **options
    )
    logged = fit(stage, [batch]).callback_metrics
    own = regenerate(build_dense().eval(), batch, max_new_tokens=3, temperature=0.0)
    plain = MimicDistillation(build_dense, build_teacher, sgd, loss_weights={"lm": 0.0})
    expected = fit(plain, [own]).callback_metrics
    assert logged["train/kd_loss"].item() == pytest.approx(expected["train/kd_loss"].item(), rel=1e-5)
    for name, value in parameters_of(plain).items():
        torch.testing.assert_close(parameters_of(stage)[name], value)
    assert stage.model.training


def test_routers_learn_the_domains_that_they_are_told() -> None:
    sources = torch.tensor([0, 1, 0, 1])
    batch = dataclasses.replace(tiny_batch(("sqa", "iqqqqa", "sqqa", "iqqa")), sources=sources)
    for name in ("modular_experts", "moe_tuning"):
        losses = []
        for num_steps in (1, 40):
            stage = make_stage(name, loss_weights={"domain_router": 1.0, "lm": 0.0, "load_balancing": 0.0})
            losses.append(fit(stage, [batch] * num_steps).callback_metrics["train/domain_router_loss"])
        assert losses[1] < 0.5 * losses[0], name
    with pytest.raises(ValueError, match="domain_router needs a router"):
        fit(make_stage("instruction_tuning", loss_weights={"domain_router": 1.0}), [batch])
