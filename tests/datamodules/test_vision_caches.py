"""Features of a frozen encoder from a cache: the same run without it, refused when it is of something else."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.instructions import InstructionDataModule
from lightning_modules.connector_alignment import ConnectorAlignment
from lightning_modules.instruction_tuning import InstructionTuning
from lightning_modules.mimic_distillation import MimicDistillation
from moevlm.data.index import read_index
from moevlm.evaluation.vision_caching import fill_vision_cache
from moevlm.models.pretrained import load_pretrained
from tests.lightning_modules.runs import parameters_of, quiet_trainer, sgd
from tests.samples import llava_record, make_shards, small_processor
from tests.tiny import save_tiny_vlm, tiny_decoder_config, tiny_vision_config

MODEL = {
    "vision": tiny_vision_config(image_size=8, patch_size=4),
    "language_model": tiny_decoder_config(vocab_size=336, num_hidden_layers=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: str(save_tiny_vlm(root / name, seed=seed, **MODEL)) for name, seed in (("own", 5), ("other", 6))}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_shards(tmp_path, [llava_record(number) for number in range(12)], samples_per_shard=5)


def datamodule(shards: Path, weights: str | None, **options: Any) -> Any:
    sources = [{"name": "one", "shards": str(shards)}]
    cache = {"dtype": "float32", **options.pop("cache", {})}
    if weights is not None:
        options["vision_cache"] = {"weights": weights, **cache}
    processor = options.pop("processor", small_processor(num_visual_tokens=4))
    sizes = {"num_steps": 3, "global_batch_size": 4, "micro_batch_size": 2}
    return InstructionDataModule(sources, processor, validation_sources=sources, **{**sizes, **options})


def write(module: Any) -> None:
    for request in module.vision_requests():
        assert fill_vision_cache(request, batch_size=3)


def fit(stage: Any, module: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    trainer = quiet_trainer(max_steps=3)
    trainer.fit(stage, datamodule=module)
    return parameters_of(stage), {name: float(value) for name, value in trainer.callback_metrics.items()}


def check_same_run(stages: list[Any], modules: list[Any], *, tolerance: float = 1e-5) -> None:
    (first, losses), (second, cached_losses) = (fit(stage, module) for stage, module in zip(stages, modules))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=tolerance, atol=tolerance)
    assert cached_losses == pytest.approx(losses, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", [ConnectorAlignment, InstructionTuning])
def test_a_run_from_cached_features_is_the_run_with_the_encoder(
    kind: Any, shards: Path, folders: dict[str, str]
) -> None:
    cached = datamodule(shards, folders["own"])
    write(cached)
    stages = [kind(partial(load_pretrained, folders["own"]), sgd) for _ in range(2)]
    check_same_run(stages, [datamodule(shards, None), cached])
    batch = next(iter(cached.val_dataloader()))[0]
    assert not batch.images
    assert batch.features["default"].shape == (batch.num_images, 4, 24)


def test_stored_in_half_precision_losses_are_close(shards: Path, folders: dict[str, str]) -> None:
    cached = datamodule(shards, folders["own"], cache={"dtype": "float16"})
    write(cached)
    stages = [ConnectorAlignment(partial(load_pretrained, folders["own"]), sgd) for _ in range(2)]
    check_same_run(stages, [datamodule(shards, None), cached], tolerance=5e-3)


def test_tiles_and_dropped_rounds_keep_their_pictures(tmp_path: Path, folders: dict[str, str]) -> None:
    turn, answer = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "grass"}
    both = {"id": "two", "image": ["1.png", "2.png"], "conversations": [turn, answer] * 2}
    shards = make_shards(tmp_path, [both, llava_record(3)])
    tiled = dataclasses.replace(small_processor().image_transform, mode="anyres", grids=[[1, 2], [2, 1]])
    for transform, length in ((small_processor().image_transform, 44), (tiled, 60), (tiled, 512)):
        processor = small_processor(num_visual_tokens=4, max_length=length, overlong="drop_rounds")
        processor = type(processor)(
            processor.tokenizer, "chatml", transform, max_length=length, num_visual_tokens=4, overlong="drop_rounds"
        )
        plain, cached = (datamodule(shards, weights, processor=processor) for weights in (None, folders["own"]))
        write(cached)
        encoder = load_pretrained(folders["own"]).vision_encoder
        for seen, stored in zip(plain.val_dataloader(), cached.val_dataloader(), strict=True):
            assert stored[0].tilings == seen[0].tilings
            assert torch.equal(stored[0].input_ids, seen[0].input_ids)
            with torch.no_grad():
                expected = encoder(seen[0].view("default"))
            torch.testing.assert_close(stored[0].features["default"], expected)
            part = stored[0].select([1])
            assert torch.equal(part.features["default"], expected[len(expected) - len(part.features["default"]) :])


def test_an_unusable_image_is_rejected_as_without_a_cache(shards: Path, folders: dict[str, str]) -> None:
    tar = shards / "000000.tar"
    (place,) = [member for member in read_index(tar).members(1) if member[0] == "png"]
    data = bytearray(tar.read_bytes())
    data[place[1] : place[1] + place[2]] = b"x" * place[2]
    tar.write_bytes(bytes(data))
    cached = datamodule(shards, folders["own"], max_rejected_fraction=0.5)
    write(cached)
    loaders = [module.train_dataloader() for module in (datamodule(shards, None, max_rejected_fraction=0.5), cached)]
    keys = [[key for step in loader for batch in step for key in batch.keys] for loader in loaders]
    assert keys[0] == keys[1]
    assert loaders[0].rejections.reasons == loaders[1].rejections.reasons == {"unreadable_image": 1}


def test_a_teacher_with_an_encoder_of_its_own_needs_pixels_too(shards: Path, folders: dict[str, str]) -> None:
    build, teacher = (partial(load_pretrained, folders[name]) for name in ("own", "other"))
    cached = datamodule(shards, folders["own"], cache={"pixels": True})
    write(cached)
    stages = [MimicDistillation(build, teacher, sgd) for _ in range(3)]
    check_same_run(stages[:2], [datamodule(shards, None), cached])
    with pytest.raises(ValueError, match=r"no pixels, and a model .* set data.vision_cache.pixels=true"):
        fit(stages[2], datamodule(shards, folders["own"]))
    stretched = dataclasses.replace(small_processor().image_transform, mode="stretch")
    other_view = small_processor(num_visual_tokens=4).with_view("teacher", stretched)
    with pytest.raises(ValueError, match=r"sees these images otherwise .* set data.vision_cache.pixels=true"):
        datamodule(shards, folders["own"], processor=other_view)


def test_what_the_features_are_not_of_is_refused(shards: Path, folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"no vision cache for this run in .*; run experiments.cache_vision with"):
        datamodule(shards, folders["own"]).setup("fit")
    write(datamodule(shards, folders["own"]))
    stretched = dataclasses.replace(small_processor().image_transform, mode="stretch")
    processor = type(small_processor())(small_processor().tokenizer, "chatml", stretched, num_visual_tokens=4)
    for message, module in {
        r"encoder \w+, not": datamodule(shards, folders["other"]),
        r"image \w+, not": datamodule(shards, folders["own"], processor=processor),
        "dtype float32, not float16": datamodule(shards, folders["own"], cache={"dtype": "float16"}),
    }.items():
        with pytest.raises(ValueError, match=f"no vision cache .* was written for another run: .*{message}"):
            module.setup("fit")
    build = partial(load_pretrained, folders["other"])
    with pytest.raises(ValueError, match=r"of another vision encoder than the model's; set data\.vision_cache"):
        fit(ConnectorAlignment(build, sgd), datamodule(shards, folders["own"]))
    with pytest.raises(ValueError, match="the vision encoder trains, so its features cannot come from a cache"):
        fit(InstructionTuning(build, sgd, trainable=["^vision_encoder"]), datamodule(shards, folders["own"]))


def test_a_truncated_or_foreign_file_is_named(shards: Path, folders: dict[str, str]) -> None:
    module = datamodule(shards, folders["own"])
    write(module)
    opened = datamodule(shards, folders["own"])
    opened.setup("fit")
    file = min(module.vision_requests()[0].key.folder(shards).glob("*.rows"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"000000\.rows has \d+ bytes, not \d+; delete it and run exp"):
        datamodule(shards, folders["own"]).setup("fit")
    with pytest.raises(
        ValueError, match=r"000000\.rows ends inside sample s\d+; delete it and run experiments.cache_v"
    ):
        list(opened.train_dataloader())
    with pytest.raises(ValueError, match=r"vision cache .* is stale: sample nobody is another now"):
        opened.vision.open(opened.sources)(0, 1, "nobody")


def test_settings_without_meaning_are_refused(shards: Path, folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['depth'\], known are enabled, vision_encoder"):
        datamodule(shards, folders["own"], cache={"depth": 1})
    with pytest.raises(ValueError, match=r"dtype must be one of float16, float32, bfloat16, got 'int8'; set data.vis"):
        datamodule(shards, folders["own"], cache={"dtype": "int8"}).vision_requests()
    with pytest.raises(ValueError, match="a vision cache needs pretrained weights"):
        datamodule(shards, None, vision_cache={"vision_encoder": {"name": "vit"}}).vision_requests()
    assert not datamodule(shards, folders["own"], cache={"enabled": False}).provides
