from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from moevlm.preprocessing import fast_images
from moevlm.preprocessing.fast_images import decode_jpeg, decode_jpeg_image, plain_jpeg_size, resize_in_torch
from moevlm.preprocessing.images import ImageTransform, decode_image
from moevlm.preprocessing.rejection import RejectedSample

DRAWS = np.random.default_rng(0)


def photograph(width: int, height: int, **options: object) -> bytes:
    """A JPEG with shapes and noise."""
    small = Image.fromarray(DRAWS.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"optimize": True}])
def test_a_jpeg_has_the_very_pixels_that_pillow_gives(options: dict[str, object]) -> None:
    data = photograph(161, 97, **options)
    fast = decode_jpeg(data)
    assert fast is not None
    assert np.array_equal(fast, Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data), fast)


@pytest.mark.parametrize("size", [(161, 97), (16, 16), (640, 17)])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_a_picture_in_the_decoders_memory_is_the_copied_one(size: tuple[int, int], options: dict[str, object]) -> None:
    data = photograph(*size, **options)
    shared, copied = decode_jpeg_image(data), Image.fromarray(decode_jpeg(data))
    assert shared.mode == "RGB"
    assert np.array_equal(shared, copied)
    for way in (lambda one: one.resize((33, 20), Image.Resampling.BICUBIC), lambda one: one.crop((2, 3, 9, 11))):
        assert way(shared).tobytes() == way(copied).tobytes()


def test_without_arrow_pixels_are_copied_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = photograph(161, 97)
    expected = {mode: ImageTransform(56, mode=mode)(data) for mode in ("pad", "square", "stretch")}
    monkeypatch.setattr(fast_images, "_arrow", lambda: None)
    for mode, pixels in expected.items():
        assert torch.equal(ImageTransform(56, mode=mode)(data), pixels)


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    buffer = io.BytesIO()
    Image.fromarray(DRAWS.integers(0, 255, (24, 32), dtype=np.uint8)).save(buffer, "JPEG")
    expected = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    assert np.array_equal(decode_image(buffer.getvalue()), expected)


def test_what_breaks_off_is_left_to_pillow_and_rejected() -> None:
    data = photograph(160, 96)[:-700]
    assert decode_jpeg(data) is None
    with pytest.raises(RejectedSample, match="unreadable_image"):
        decode_image(data)


@pytest.mark.parametrize("resampling", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("size", [(64, 64), (200, 37)])
def test_torch_resizes_as_pillow_within_one_level(resampling: Image.Resampling, size: tuple[int, int]) -> None:
    image = decode_image(photograph(320, 240))
    found = resize_in_torch(np.array(image), (size[1], size[0]), resampling)
    difference = np.abs(found.astype(int) - np.asarray(image.resize(size, resampling), dtype=int))
    assert difference.max() <= 1


@pytest.mark.parametrize("mode", ["pad", "square", "stretch"])
def test_the_fast_transform_is_close_to_the_exact_one(mode: str) -> None:
    data = photograph(640, 480)
    exact = ImageTransform(56, mode=mode)(data)
    assert (ImageTransform(56, mode=mode, resizer="torch")(data) - exact).abs().max() <= 2.1 / 127.5
    drafted = ImageTransform(56, mode=mode, resizer="torch", draft=True)(data)
    assert 0 < (drafted - exact).abs().mean() < 4 / 127.5


def test_a_draft_keeps_at_least_the_side_that_is_asked_for() -> None:
    assert decode_image(photograph(640, 480), 56).size == (80, 60)
    assert decode_image(photograph(640, 480), 481).size == (640, 480)


def test_settings_of_speed_are_kept_and_checked() -> None:
    fast = ImageTransform(56, resizer="torch", draft=True)
    assert ImageTransform(**fast.to_dict()) == fast
    assert "resizer" not in ImageTransform(56).to_dict()
    with pytest.raises(ValueError, match=r"resizer must be one of pil, torch, got 'cv2'; set processor.image.resizer"):
        ImageTransform(56, resizer="cv2")
    with pytest.raises(ValueError, match=r"set processor.image.draft=false"):
        ImageTransform(56, mode="anyres", draft=True)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"x" * 300}, {"dpi": (72, 72)}])
def test_the_size_of_a_plain_jpeg_is_read_from_its_frame(options: dict[str, object]) -> None:
    assert plain_jpeg_size(photograph(161, 97, **options)) == (97, 161)


def test_a_jpeg_that_needs_judging_is_left_to_pillow() -> None:
    turned, grey = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    Image.new("L", (9, 5)).save(grey, "JPEG")
    for data in (
        photograph(64, 48, exif=turned),
        grey.getvalue(),
        b"",
        b"\xff\xd8",
        photograph(64, 48)[:20],
        b"GIF89a",
    ):
        assert plain_jpeg_size(data) is None
    assert decode_image(photograph(64, 48, exif=turned)).size == (48, 64)
