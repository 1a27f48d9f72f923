"""What holds for every stage."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_modules.instruction_tuning import InstructionTuning
from lightning_modules.mimic_distillation import MimicDistillation
from lightning_modules.moe_tuning import MoETuning
from lightning_modules.preference_distillation import PreferenceDistillation
from lightning_modules.schedules import warmup_cosine
from moevlm.batch import IGNORE_INDEX
from moevlm.preprocessing.mismatch import mismatched_batch
from tests.lightning_modules.runs import (
    STAGES,
    adamw,
    build_dense,
    build_sparse,
    build_teacher,
    fit,
    initial_parameters,
    make_batch,
    make_stage,
    parameters_of,
    quiet_trainer,
    sgd,
)
from tests.tiny import tiny_batch

TEACHED = ("mimic_distillation", "preference_distillation")
NO_BALANCING = {"load_balancing": 0.0, "router_z": 0.001}


@pytest.mark.parametrize("name", list(STAGES))
def test_one_step_moves_only_what_trainable_names(name: str) -> None:
    stage = make_stage(name)
    fit(stage, [make_batch()])
    before, after = initial_parameters(name), parameters_of(stage)
    for key, value in after.items():
        trains = any(re.search(pattern, key) for pattern in stage.trainable)
        assert torch.equal(value, before[key]) != trains, key


@pytest.mark.parametrize("name", list(STAGES))
def test_one_batch_can_be_overfitted(name: str) -> None:
    """Its answers follow an image at once, so that the connector alone can tell them apart."""
    batch, losses = tiny_batch(("sia", "sqia", "sqqia", "sqqqia"), pairs=True), []
    for num_steps in (1, 60):
        fast = partial(torch.optim.AdamW, lr=3e-2)
        stage = make_stage(name, optimizer=fast, loss_weights={"load_balancing": 0.0})
        losses.append(fit(stage, [batch] * num_steps).callback_metrics["train/loss"])
    assert losses[1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("name", list(STAGES))
def test_any_split_of_a_step_gives_the_same_parameters(name: str) -> None:
    """Without load balancing, which is a statistic of a micro-batch."""
    letters = ("siqqaa", "siqqa", "sqqaaa", "sqqa")
    whole = tiny_batch(letters, pairs=True, content_seed=5)
    halves = [tiny_batch(letters[:2], pairs=True, content_seed=5), tiny_batch(letters[2:], pairs=True, content_seed=7)]
    results = []
    for step in (whole, [whole], halves):
        stage = make_stage(name, optimizer=sgd, loss_weights=NO_BALANCING)
        trainer = fit(stage, [step])
        results.append((parameters_of(stage), trainer.callback_metrics))
    for parameters, metrics in results[1:]:
        for key, value in parameters.items():
            torch.testing.assert_close(value, results[0][0][key], rtol=1e-4, atol=1e-6)
        assert {key: float(value) for key, value in metrics.items()} == pytest.approx(
            {key: float(value) for key, value in results[0][1].items()}, rel=1e-4, abs=1e-6
        )


@pytest.mark.parametrize("name", list(STAGES))
def test_stop_and_resume_equals_no_stop(name: str, tmp_path: Path) -> None:
    """The checkpoint is read with Lightning's default, weights_only=True: it holds plain values only."""
    steps = [[make_batch(2 * index), make_batch(2 * index + 1)] for index in range(4)]
    scheduler = partial(warmup_cosine, num_steps=4, num_warmup_steps=1)
    unbroken = make_stage(name, scheduler=scheduler)
    fit(unbroken, steps)
    fit(make_stage(name, scheduler=scheduler), steps, max_steps=2).save_checkpoint(tmp_path / "two.ckpt")
    resumed = make_stage(name, scheduler=scheduler)
    trainer = fit(resumed, steps, done=2, ckpt_path=tmp_path / "two.ckpt")
    assert trainer.global_step == 4
    for key, value in parameters_of(unbroken).items():
        assert torch.equal(parameters_of(resumed)[key], value), key


@pytest.mark.parametrize("name", list(STAGES))
def test_a_step_without_labels_costs_nothing_and_is_no_nan(name: str) -> None:
    batch = make_batch()
    blank = torch.full_like(batch.labels, IGNORE_INDEX)
    batch = dataclasses.replace(batch, labels=blank, num_targets=0)
    stage = make_stage(name, optimizer=sgd, loss_weights={"load_balancing": 0.0})
    metrics = fit(stage, [[batch, batch]]).callback_metrics
    assert all(torch.isfinite(value) for value in metrics.values())
    expected = {"train/preference_loss": torch.log(torch.tensor(2.0)).item()}  # equal log-ratios of 0
    for key in ("train/lm_loss", "train/kd_loss", "train/preference_loss"):
        if key in metrics:
            assert metrics[key].item() == pytest.approx(expected.get(key, 0.0), abs=1e-6)
    assert metrics["optim/grad_norm"] == 0


@pytest.mark.parametrize("name", TEACHED)
def test_the_teacher_gets_no_gradient_and_is_in_no_checkpoint(name: str, tmp_path: Path) -> None:
    stage = make_stage(name)
    trainer = fit(stage, [make_batch()] * 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"model.{key}" for key in stage.model.state_dict()}
    for (key, parameter), (_, fresh) in zip(stage.teacher.named_parameters(), build_teacher().named_parameters()):
        assert parameter.grad is None, key
        assert not parameter.requires_grad, key
        assert torch.equal(parameter, fresh), key
    assert not stage.teacher.training
    trained = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in stage.teacher.parameters()}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(make_stage("instruction_tuning"), [make_batch()]).save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint of another model: .*router.* missing there"):
        fit(make_stage("moe_tuning"), [make_batch()] * 2, ckpt_path=tmp_path / "dense.ckpt")


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient() -> None:
    stage = MimicDistillation(build_dense, build_dense, adamw)
    metrics = fit(stage, [make_batch()]).callback_metrics
    assert metrics["train/kd_loss"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["train/teacher_agreement"] == 1
    assert metrics["train/student_entropy"] == metrics["train/teacher_entropy"]
    assert metrics["optim/grad_norm"].item() == pytest.approx(0, abs=1e-5)


def test_a_teacher_sees_its_own_view_of_the_images() -> None:
    batch = make_batch()
    other = dataclasses.replace(batch, images={**batch.images, "teacher": torch.zeros_like(batch.images["default"])})
    losses = []
    for item in (batch, other):
        stage = MimicDistillation(build_dense, build_dense, adamw)
        losses.append(fit(stage, [item]).callback_metrics["train/kd_loss"].item())
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[1] > 1e-6


def test_a_reference_of_itself_is_the_policy_at_the_start() -> None:
    stage = PreferenceDistillation(build_sparse, adamw, reference="self", loss="kto_pair")
    trainer = fit(stage, [make_batch()])
    assert trainer.callback_metrics["train/preference_loss"].item() == pytest.approx(0.5)
    assert trainer.callback_metrics["train/reward_margin"] == 0
    assert trainer.callback_metrics["train/reference_kl"].item() == pytest.approx(0, abs=1e-6)
    for key, parameter in stage.frozen["self"].model.named_parameters():
        assert torch.equal(parameter, initial_parameters("preference_distillation")[key]), key


def preference_metrics(**options: Any) -> dict[str, float]:
    stage = PreferenceDistillation(build_sparse, adamw, build_teacher=build_teacher, **options)
    return {key: float(value) for key, value in fit(stage, [make_batch()]).callback_metrics.items()}


def test_a_blend_of_references_lies_between_them() -> None:
    names = ("teacher", "self", "blend")
    found = {name: preference_metrics(reference=name) for name in names}
    for key in ("train/chosen_reward", "train/reward_margin", "train/reference_kl"):
        teacher, own, blend = (found[name][key] for name in names)
        assert blend == pytest.approx((teacher + own) / 2, rel=1e-4, abs=1e-6), key
    quarter = preference_metrics(reference="blend", teacher_share=0.25)["train/reward_margin"]
    assert quarter == pytest.approx(0.25 * found["teacher"]["train/reward_margin"], rel=1e-4)


def test_simpo_needs_no_reference_and_looks_at_means() -> None:
    found = preference_metrics(reference="none", loss="simpo", aggregation="mean", beta=2.0, margin=0.5)
    model, batch = build_sparse(), make_batch()
    output = model(batch)
    rows, targets = output.prediction_rows(batch.labels)
    log_probs = -cross_entropy(model.head.logits(output.hidden_states[rows]), targets, reduction="none")
    chosen_1, rejected_1, chosen_2, rejected_2 = (part.mean() for part in log_probs.split([2, 1, 3, 1]))
    margins = torch.stack([chosen_1 - rejected_1, chosen_2 - rejected_2])
    expected = -torch.nn.functional.logsigmoid(2 * margins - 0.5).mean()
    assert found["train/preference_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert "train/reference_kl" not in found


def test_kto_estimates_its_reference_point_from_mismatched_pairs() -> None:
    found = preference_metrics(loss="kto")
    policy, reference, batch = build_sparse(), build_teacher(), mismatched_batch(make_batch())
    log_probs = []
    for model in (policy, reference):
        output = model(batch)
        rows, targets = output.prediction_rows(batch.labels)
        log_probs.append(-cross_entropy(model.head.logits(output.hidden_states[rows]), targets, reduction="sum"))
    assert found["train/mismatched_kl"] == pytest.approx(((log_probs[0] - log_probs[1]) / 4).item(), rel=1e-3)


def test_a_chosen_answer_without_a_rejected_one_is_refused_by_its_key() -> None:
    batch = tiny_batch(("siqqaa", "siqqa", "sqqaaa"))
    batch = dataclasses.replace(
        batch, pair_ids=torch.tensor([0, 0, -1]), is_chosen=torch.tensor([True, False, True]), num_pairs=1
    )
    with pytest.raises(ValueError, match=r"needs a rejected answer beside each chosen one, which sample2 lacks"):
        fit(make_stage("preference_distillation"), [batch])


def test_the_anchor_of_preference_distillation_looks_at_chosen_answers_only() -> None:
    batch = make_batch()
    labels = batch.labels.clone()
    labels[~batch.is_chosen[batch.sequence_ids()]] = IGNORE_INDEX
    chosen = dataclasses.replace(batch, labels=labels, num_targets=int((labels != IGNORE_INDEX).sum()))
    anchored = fit(make_stage("preference_distillation"), [batch]).callback_metrics["train/lm_loss"]
    plain = fit(InstructionTuning(build_sparse, adamw), [chosen]).callback_metrics["train/lm_loss"]
    torch.testing.assert_close(anchored, plain)


def test_a_step_is_the_gradient_of_the_mean_over_all_targets() -> None:
    """Micro-batches of 5 and 1 targets, against one mean over 6 written out."""
    micro_batches = [tiny_batch(("siqqaaaaa",), seed=1), tiny_batch(("sqqa",), seed=2)]
    stage = InstructionTuning(build_dense, sgd, gradient_clip_norm=None)
    fit(stage, [micro_batches])
    model = build_dense()
    losses = []
    for batch in micro_batches:
        output = model(batch)
        rows, targets = output.prediction_rows(batch.labels)
        losses.append(cross_entropy(model.head.logits(output.hidden_states[rows]), targets, reduction="sum"))
    (sum(losses) / 6).backward()
    for key, parameter in model.named_parameters():
        if key.startswith("vision_encoder"):
            continue
        expected = parameter - 0.5 * parameter.grad
        torch.testing.assert_close(parameters_of(stage)[key], expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_clipped_to_the_norm_and_logged_before() -> None:
    stage = InstructionTuning(build_dense, sgd, gradient_clip_norm=0.1)
    norm = fit(stage, [make_batch()]).callback_metrics["optim/grad_norm"]
    moved = [
        (value - initial_parameters("instruction_tuning")[key]) / 0.5 for key, value in parameters_of(stage).items()
    ]
    assert norm > 0.1
    assert torch.cat([value.flatten() for value in moved]).norm().item() == pytest.approx(0.1, rel=1e-3)


def test_a_gradient_that_is_not_finite_ends_the_run() -> None:
    batch = make_batch()
    broken = dataclasses.replace(batch, images={"default": batch.images["default"] * float("nan")})
    with pytest.raises(ValueError, match=r"gradient norm at step 1 is nan, not finite \(1 such steps, 0 allowed\)"):
        fit(make_stage("instruction_tuning"), [batch, broken])


def test_tolerated_steps_that_are_not_finite_change_no_parameter() -> None:
    batch = make_batch()
    broken = dataclasses.replace(batch, images={"default": batch.images["default"] * float("nan")})
    stages = [make_stage("instruction_tuning", max_nonfinite_steps=1) for _ in range(2)]
    fit(stages[0], [batch])
    trainer = fit(stages[1], [batch, broken])
    assert trainer.global_step == 2
    assert trainer.callback_metrics["optim/nonfinite_steps"] == 1
    for key, value in parameters_of(stages[0]).items():
        assert torch.equal(parameters_of(stages[1])[key], value), key


def test_validation_is_a_mean_over_all_targets_and_changes_nothing() -> None:
    items = [tiny_batch(("siqqaaaaa",), seed=1), [tiny_batch(("sqqa",), seed=2)]]
    weights = {"lm": {"start": 1.0, "end": 3.0, "steps": 10}}
    stage = InstructionTuning(build_dense, adamw, loss_weights=weights)
    trainer = quiet_trainer()
    trainer.validate(stage, torch.utils.data.DataLoader(items, batch_size=None), verbose=False)  # type: ignore[arg-type]
    batches = [tiny_batch(("siqqaaaaa",), seed=1), tiny_batch(("sqqa",), seed=2)]
    sums = [stage.compute_losses(batch).losses["lm"].sum.item() for batch in batches]
    assert trainer.callback_metrics["val/lm_loss"].item() == pytest.approx(sum(sums) / 6, rel=1e-6)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(3 * sum(sums) / 6, rel=1e-6)

    watched, unwatched = make_stage("moe_tuning"), make_stage("moe_tuning")
    fit(watched, [make_batch()] * 2, val=items, val_check_interval=1, check_val_every_n_epoch=None)
    fit(unwatched, [make_batch()] * 2)
    for key, value in parameters_of(unwatched).items():
        assert torch.equal(parameters_of(watched)[key], value), key


def test_loss_weights_follow_their_schedule() -> None:
    weights = {"lm": 1.0, "load_balancing": {"start": 2.0, "end": 0.0, "steps": 2}}
    totals = []
    for num_steps in (1, 2, 3):
        stage = MoETuning(build_sparse, partial(torch.optim.SGD, lr=0.0), loss_weights=weights)
        metrics = fit(stage, [make_batch()] * num_steps).callback_metrics
        totals.append((metrics["train/loss"] - metrics["train/lm_loss"]) / metrics["train/load_balancing_loss"])
    assert [total.item() for total in totals] == pytest.approx([2.0, 1.0, 0.0], abs=1e-5)


def test_the_learning_rate_is_the_one_of_the_step() -> None:
    scheduler = partial(warmup_cosine, num_steps=4, num_warmup_steps=2)
    rates = []
    for num_steps in (1, 2, 3):
        stage = make_stage("instruction_tuning", scheduler=scheduler)
        rates.append(fit(stage, [make_batch()] * num_steps).callback_metrics["optim/lr"].item())
    assert rates == pytest.approx([0.005, 0.01, 0.01])


def test_settings_without_effect_or_meaning_are_refused() -> None:
    cases = [
        (partial(make_stage, "instruction_tuning", loss_weights={"kd": 1.0}), "unknown loss 'kd'; this stage has lm"),
        (partial(make_stage, "instruction_tuning", gradient_clip_norm=0), "gradient_clip_norm must be positive"),
        (partial(make_stage, "instruction_tuning", loss_kernel="triton"), "loss_kernel must be one of"),
        (partial(make_stage, "mimic_distillation", temperature=0.0), "temperature must be positive"),
        (partial(make_stage, "preference_distillation", loss="orpo"), "loss must be one of"),
        (partial(make_stage, "preference_distillation", aggregation="max"), "aggregation must be one of"),
        (partial(make_stage, "preference_distillation", teacher_share=2.0), r"teacher_share must lie in \[0, 1\]"),
        (partial(make_stage, "preference_distillation", reference="other"), "reference must be one of"),
        (partial(PreferenceDistillation, build_sparse, adamw), "needs a teacher; set stage.build_teacher"),
    ]
    for build, message in cases:
        with pytest.raises(ValueError, match=message):
            build()
    for name in STAGES:
        with pytest.raises(TypeError, match="gradient_clip"):
            make_stage(name, gradient_clip=1.0)


def test_moe_tuning_of_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a sparse model"):
        fit(MoETuning(build_dense, adamw), [make_batch()])
