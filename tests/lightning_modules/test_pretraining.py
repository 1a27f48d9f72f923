from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_modules.pretraining import LanguagePretraining, VisionPretraining
from moevlm.batch import IGNORE_INDEX
from moevlm.models.vision_encoder import VisionEncoder
from tests.lightning_modules.runs import SHAPE, adamw, fit, parameters_of, sgd
from tests.tiny import tiny_batch, tiny_decoder_config, tiny_vision_config, tiny_vlm

ATTRIBUTES = {"colour": 3, "shape": 2}


def build_encoder() -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(**tiny_vision_config(feature_layer=-1))


def make_images(num_images: int = 4, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, 32, 32, generator=generator)
    labels = {
        name: torch.randint(num_values, (num_images, 16), generator=generator)
        for name, num_values in ATTRIBUTES.items()
    }
    labels["shape"][:, ::3] = IGNORE_INDEX
    return {"images": images, "labels": labels}


def make_vision_stage(**settings: object) -> VisionPretraining:
    torch.manual_seed(1)
    return VisionPretraining(build_encoder, ATTRIBUTES, **{"optimizer": adamw, **settings})  # type: ignore[arg-type]


def part(batch: dict, rows: slice) -> dict:
    return {"images": batch["images"][rows], "labels": {name: label[rows] for name, label in batch["labels"].items()}}


def test_a_batch_of_patches_can_be_overfitted() -> None:
    metrics = fit(make_vision_stage(), [make_images()] * 60).callback_metrics
    assert metrics["train/attribute_loss"] < 0.5
    assert metrics["train/colour_accuracy"] > 0.8


def test_any_split_of_a_step_of_images_gives_the_same_parameters() -> None:
    batch, results = make_images(), []
    for step in ([batch], [part(batch, slice(0, 1)), part(batch, slice(1, 4))]):
        stage = make_vision_stage(optimizer=sgd)
        stage.configure_model()
        stage.model.load_state_dict({key: torch.ones_like(v) * 0.01 for key, v in stage.model.state_dict().items()})
        fit(stage, [step])
        results.append(parameters_of(stage))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-6)


def test_images_without_labels_cost_nothing() -> None:
    batch = make_images()
    batch["labels"] = {name: torch.full_like(labels, IGNORE_INDEX) for name, labels in batch["labels"].items()}
    metrics = fit(make_vision_stage(), [batch]).callback_metrics
    assert metrics["train/attribute_loss"] == metrics["optim/grad_norm"] == 0


def test_the_encoder_trained_is_the_one_that_a_vlm_loads(tmp_path: Path) -> None:
    stage = make_vision_stage()
    fit(stage, [make_images()] * 2)
    stage.model.vision_encoder.save_pretrained(tmp_path)
    loaded = VisionEncoder(**tiny_vision_config(feature_layer=-1, weights=str(tmp_path)))
    images = make_images()["images"]
    with torch.no_grad():
        assert torch.equal(loaded(images), stage.model.vision_encoder(images))


def test_attributes_are_required() -> None:
    with pytest.raises(ValueError, match="at least one attribute"):
        VisionPretraining(build_encoder, {}, adamw)


def test_language_pretraining_overfits_a_text() -> None:
    build = partial(tiny_vlm, vision=None, language_model=tiny_decoder_config(**SHAPE))
    batch = tiny_batch(("qaaaaaaa", "qaaaa"))
    metrics = fit(LanguagePretraining(build, adamw), [batch] * 40).callback_metrics
    assert metrics["train/lm_loss"] < 2
