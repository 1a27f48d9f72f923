"""Levels in a batch become what the image transform says, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from moevlm.batch import PixelScale
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.images import ImageTransform
from tests.tiny import tiny_batch


def test_normalising_is_the_formula_in_float32() -> None:
    levels_3HW = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    scale = PixelScale((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    found = scale.normalise(levels_3HW)
    for channel, (mean, std) in enumerate(zip(scale.mean, scale.std)):
        levels = np.arange(256, dtype=np.float32).reshape(16, 16)
        expected = (levels / np.float32(255) - np.float32(mean)) / np.float32(std)
        assert np.array_equal(found[channel].numpy(), expected)


def test_a_view_without_scale_is_taken_as_it_is() -> None:
    batch = tiny_batch(("iqa",))
    assert batch.view("default") is batch.images["default"]


def test_samples_of_one_batch_agree_on_their_scale() -> None:
    import dataclasses

    from moevlm.evaluation.regenerate import sequences_of

    levels, _ = ImageTransform(8).stack([Image.new("RGB", (8, 8), (10, 20, 30))])
    (sample,) = sequences_of(tiny_batch(("iqa",)))
    one = dataclasses.replace(sample, images={"default": levels}, scales={"default": ImageTransform(8).scale})
    other = dataclasses.replace(one, scales={"default": ImageTransform(8, mean=(0.1, 0.2, 0.3)).scale})
    assert pack([one, one]).select([1]).view("default").shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="another mean or std"):
        pack([one, other])
    with pytest.raises(ValueError, match="normalised pixels"):
        pack([one, dataclasses.replace(one, images={"default": levels.float()}, scales={})])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    levels = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    scale = ImageTransform(9, mean=(0.1, 0.2, 0.3), std=(0.7, 0.8, 0.9)).scale
    assert torch.equal(scale.normalise(levels.cuda()).cpu(), scale.normalise(levels))
