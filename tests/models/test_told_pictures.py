"""Pictures told in words: what a decoder sees of them."""

from __future__ import annotations

import pytest
import torch

from datamodules.world_pretraining import SceneDocuments
from moevlm.batch import DEFAULT_VIEW, VLMBatch
from moevlm.models.told_pictures import PictureReader, build_picture_reader
from moevlm.world.scenes import iterate_scenes
from tests.samples import small_processor
from tests.tiny import tiny_decoder_config


def documents(picture_fraction: float, grid: int = 6) -> VLMBatch:
    scenes = list(iterate_scenes("train", 0, 8))
    plan = {"batch_size": 8, "seed": 0, "rank": 0, "world_size": 1}
    processor = small_processor(max_length=4096)
    (batch,) = SceneDocuments(scenes, processor, picture_fraction=picture_fraction, grid=grid, **plan)[0]
    return batch


def reader(num_patches: int = 36) -> PictureReader:
    vocabulary = len(small_processor().tokenizer)
    config = tiny_decoder_config(vocab_size=vocabulary, max_position_embeddings=4096)
    return build_picture_reader(config, num_patches=num_patches)


def test_a_visual_token_is_the_sum_of_its_words_over_the_root_of_their_number() -> None:
    model, batch = reader(), documents(1.0)
    inputs = model.embed(batch)
    table = model.language_model.get_input_embeddings().weight
    rows = inputs.splice.visual_rows.unflatten(0, (batch.num_images, 36))
    for image in range(batch.num_images):
        for patch in (0, 7, 20, 35):
            words = [word for word in batch.images[DEFAULT_VIEW][image, patch].tolist() if word >= 0]
            expected = sum(table[word] for word in words) / len(words) ** 0.5
            torch.testing.assert_close(inputs.inputs_embeds[rows[image, patch]], expected)


def test_a_share_of_the_scenes_is_shown_and_the_rest_is_told() -> None:
    assert documents(0.0).num_images == 0
    assert documents(1.0).num_images == 8
    assert 0 < documents(0.5).num_images < 8


def test_words_of_pictures_receive_a_gradient() -> None:
    model, batch = reader(), documents(1.0)
    words = batch.images[DEFAULT_VIEW]
    unseen = set(words[words >= 0].tolist()) - set(batch.input_ids.tolist())
    assert unseen
    model(batch).hidden_states.square().sum().backward()
    gradient = model.language_model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert all(gradient[word].abs().sum() > 0 for word in unseen)


def test_texts_without_a_picture_are_read_as_by_any_decoder() -> None:
    batch = documents(0.0)
    model = reader()
    blind = super(PictureReader, model)._splice(batch, None, DEFAULT_VIEW)
    assert torch.equal(model.embed(batch).inputs_embeds, blind.inputs_embeds)


def test_a_picture_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"25 patches for a model of 36; set model\.num_patches"):
        reader()(documents(1.0, grid=5))
