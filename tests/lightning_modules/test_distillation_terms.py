"""What the mimic stage makes of its settings beyond the token loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_modules.mimic_distillation import MimicDistillation
from lightning_modules.mimic_settings import MimicPlan
from moevlm.losses.selection import UNIT_OF
from tests.lightning_modules.runs import (
    EVERY_TERM,
    adamw,
    build_dense,
    build_teacher,
    fit,
    make_batch,
    make_stage,
    parameters_of,
    sgd,
)

CASES = ("mimic_with_every_term", "mimic_by_gradient_norm")


def metrics_of(steps: int = 1, **options: Any) -> dict[str, float]:
    stage = MimicDistillation(build_dense, build_teacher, adamw, **options)
    return {key: float(value) for key, value in fit(stage, [make_batch()] * steps).callback_metrics.items()}


@pytest.mark.parametrize("name", CASES)
def test_any_split_of_a_step_gives_the_same_parameters(name: str) -> None:
    from tests.tiny import tiny_batch

    letters = ("siqqaa", "siqqa", "sqqaaa", "sqqa")
    whole = tiny_batch(letters, pairs=True, content_seed=5)
    halves = [tiny_batch(letters[:2], pairs=True, content_seed=5), tiny_batch(letters[2:], pairs=True, content_seed=7)]
    results = []
    for step in ([whole], halves):
        stage = make_stage(name, optimizer=sgd)
        stage.loss_weights["load_balancing"] = 0.0
        fit(stage, [step, step])
        results.append(stage.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=1e-5)


def test_projections_and_adapted_weights_resume(tmp_path: Path) -> None:
    name = "mimic_with_every_term"
    steps = [make_batch(index) for index in range(4)]
    unbroken = make_stage(name)
    trainer = fit(unbroken, steps)
    fit(make_stage(name), steps, max_steps=2).save_checkpoint(tmp_path / "two.ckpt")
    resumed = make_stage(name)
    again = fit(resumed, steps, done=2, ckpt_path=tmp_path / "two.ckpt")
    for key, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    for key in ("train/kd_weight", "train/loss"):
        assert again.callback_metrics[key] == trainer.callback_metrics[key]


def test_every_term_gives_a_gradient_and_its_projection_trains() -> None:
    weightless = dict.fromkeys(EVERY_TERM, 0.0)
    plain = MimicDistillation(build_dense, build_teacher, sgd, loss_weights={**weightless, "kd": 0.0})
    fit(plain, [make_batch()])
    for name in ("visual_kd", "hidden", "relation", "affinity", "attention"):
        stage = MimicDistillation(build_dense, build_teacher, sgd, loss_weights={**weightless, "kd": 0.0, name: 1.0})
        found = fit(stage, [make_batch()]).callback_metrics
        assert found[f"train/{name}_loss"] > 0
        assert found["optim/grad_norm"] > 0, name
        moved = [
            key for key, value in parameters_of(stage).items() if not torch.equal(value, parameters_of(plain)[key])
        ]
        assert any(key.startswith("language_model") for key in moved), name
        assert bool(stage.beside) == (name == "hidden")
    assert "train/hidden_loss" not in metrics_of()


def test_projections_stay_out_of_the_model_folder(tmp_path: Path) -> None:
    from moevlm.models.pretrained import load_pretrained

    stage = make_stage("mimic_with_every_term")
    fit(stage, [make_batch()])
    assert any(key.startswith("beside.teacher_hidden_1") for key in stage.state_dict())
    stage.save_model(tmp_path)
    assert set(load_pretrained(tmp_path).state_dict()) == set(stage.model.state_dict())


@pytest.mark.parametrize("kind", list(UNIT_OF))
def test_a_student_that_equals_its_teacher_pays_nothing_on_any_selection(kind: str) -> None:
    build = partial(build_dense, seed=3)
    weights = {"visual_kd": 1.0, "relation": 1.0, "affinity": 1.0, "attention": 1.0}
    stage = MimicDistillation(build, build, adamw, kd_tokens=kind, loss_weights=weights)
    found = fit(stage, [make_batch()]).callback_metrics
    for name in ("kd", *weights):
        assert found[f"train/{name}_loss"].item() == pytest.approx(0, abs=1e-5), name
    assert found["train/teacher_agreement"] == 1
    assert found["optim/grad_norm"].item() == pytest.approx(0, abs=1e-4)


def test_the_cross_entropy_is_of_the_answers_whatever_tokens_are_distilled() -> None:
    losses = [metrics_of(kd_tokens=kind, loss_weights={"lm": 1.0})["train/lm_loss"] for kind in ("answer", "text")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_losses_are_logged_by_source() -> None:
    import dataclasses

    batch = dataclasses.replace(make_batch(), sources=torch.tensor([0, 1, 1, 0]))
    stage = MimicDistillation(build_dense, build_teacher, adamw, source_names=["vqa", "text", "unseen"])
    found = fit(stage, [batch]).callback_metrics
    shares = {"vqa": 2 + 1, "text": 1 + 3, "unseen": 0}  # answer tokens
    total = sum(found[f"train/kd_loss/{name}"].item() * count for name, count in shares.items())
    assert total == pytest.approx(7 * found["train/kd_loss"].item(), rel=1e-5)
    assert found["train/lm_loss/unseen"] == 0


def test_validation_reports_the_true_kl() -> None:
    stage = MimicDistillation(build_dense, build_teacher, adamw, divergence="reverse_kl", temperature=2.0)
    trainer = fit(stage, [make_batch()], val=[make_batch(1)], val_check_interval=1, check_val_every_n_epoch=None)
    found = trainer.callback_metrics
    assert found["val/teacher_kl"] > 0
    assert found["val/teacher_kl"] != pytest.approx(found["val/kd_loss"].item(), rel=1e-2)


def test_adapted_weights_balance_the_measured_gradients() -> None:
    found = metrics_of(4, loss_weights={"lm": 1.0}, adaptive_weights={"losses": ["kd", "lm"], "window": 2})
    assert found["train/kd_gradient_square"] > 0
    assert found["train/kd_weight"] != pytest.approx(1.0, abs=1e-3)
    assert found["train/kd_weight"] * found["train/lm_weight"] == pytest.approx(1.0, rel=1e-4)


def test_terms_without_effect_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"terms": {"hidden_layer": [[0, 0]]}}, "unknown terms settings"),
        ({"terms": {"hidden_tokens": "all"}}, "terms.hidden_tokens has no effect while loss 'hidden' has no weight"),
        (
            {"terms": {"hidden_tokens": "affinity"}, "loss_weights": {"hidden": 1.0}},
            "hidden_tokens must be one of answer, text, visual, all",
        ),
        (
            {"terms": {"attention_distance": "l1"}, "loss_weights": {"attention": 1.0}},
            "attention_distance must be one of",
        ),
        ({"kd_tokens": "image"}, "tokens must be one of"),
        (
            {"kd_tokens": "text", "adaptive_weights": {"losses": ["kd", "lm"]}},
            "gradient_norm compares kd and lm on the same tokens",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            MimicDistillation(build_dense, build_teacher, adamw, **options)
    stage = MimicDistillation(
        build_dense, build_teacher, adamw, loss_weights={"hidden": 1.0}, terms={"hidden_layers": [[0, 9]]}
    )
    with pytest.raises(ValueError, match=r"has layers 0 to 1, asked for \[9\]"):
        fit(stage, [make_batch()])


def test_what_a_cache_does_not_know_is_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"loss_weights": {"relation": 1.0}}, "relation"),
        ({"kd_tokens": "text"}, "kd_tokens=text"),
        ({"on_policy": {"fraction": 0.5}}, "on_policy"),
    ]
    for options, named in cases:
        stage = MimicDistillation(build_dense, build_teacher, adamw, **options)
        stage._trainer = SimpleNamespace(datamodule=SimpleNamespace(provides=frozenset({"rows:top_k"})))
        message = f"a teacher cache knows the given answers' tokens only, not what {named} looks at"
        with pytest.raises(ValueError, match=message):
            stage.configure_model()


@pytest.mark.parametrize("tokens", ["visual", "all"])
def test_correctness_of_tokens_that_nobody_gave_is_refused_at_once(tokens: str) -> None:
    settings: Any = {"kd_tokens": tokens, "token_weighting": "teacher_correctness"}
    with pytest.raises(
        ValueError, match=rf"kd_tokens={tokens} holds visual tokens.*set stage\.kd_tokens=answer or text"
    ):
        MimicPlan.parse(settings, ["kd"], measures_gradients=False)
