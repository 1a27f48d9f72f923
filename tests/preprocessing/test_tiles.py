"""Any resolution from the file to the micro-batch."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from moevlm.batch import DEFAULT_VIEW, Record, Tiling, Turn
from moevlm.ops.tiling import num_tiled_tokens
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.images import ImageTransform, decode_image, upright_size
from moevlm.preprocessing.processor import Processor
from moevlm.preprocessing.rejection import RejectedSample
from moevlm.preprocessing.tiles import LLAVA_NEXT_GRIDS
from tests.reference.tiling import pictures
from tests.samples import image_bytes, png_of, small_processor, small_tokenizer

ANYRES = ImageTransform(8, mode="anyres")
SIZES = [(31, 9), (9, 31), (20, 20), (5, 6)]


def tiled_processor(**options: object) -> Processor:
    settings = {"num_visual_tokens": 4, **options}
    return Processor(small_tokenizer(), "chatml", ANYRES, **settings)  # type: ignore[arg-type]


def noise(size: tuple[int, int], seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return png_of(pixels)


def record(*images: bytes, key: str = "k") -> Record:
    question = Turn("user", "<image>" * len(images) + "What?")
    return Record(key, (question, Turn("assistant", "A red circle.")), images)


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_those_of_llava_next(size: tuple[int, int]) -> None:
    pixels, tilings = ANYRES.stack([noise(size)])
    expected = pictures(decode_image(noise(size)), LLAVA_NEXT_GRIDS, 8)
    assert tilings == (Tiling(tilings[0].rows, tilings[0].columns, size[1], size[0]),)
    assert len(pixels) == len(expected) == tilings[0].num_tiles
    for found, picture in zip(pixels, expected):
        plain = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        torch.testing.assert_close(ANYRES.scale.normalise(found), (plain - 0.5) / 0.5)


def test_sizes_read_from_the_header_are_those_of_the_upright_image() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (12, 8)).save(buffer, "JPEG", exif=exif)
    for source in (buffer.getvalue(), image_bytes(size=(12, 8))):
        upright = decode_image(source)
        assert upright_size(source) == (upright.height, upright.width)
    with pytest.raises(RejectedSample, match="unreadable_image"):
        upright_size(b"no image")


def test_a_batch_keeps_one_placeholder_an_image_however_many_tiles() -> None:
    processor = tiled_processor()
    samples = [processor.encode(record(noise((31, 9)), noise((20, 20), 1)))[0], processor.encode(record(key="t"))[0]]
    batch = pack(samples)
    assert batch.num_images == 2
    assert batch.image_sequences == (0, 0)
    assert [tiling.num_tiles for tiling in batch.view_tilings(DEFAULT_VIEW)] == [4, 5]
    assert batch.images[DEFAULT_VIEW].shape == (9, 3, 8, 8)


def test_selecting_sequences_takes_their_tiles_along() -> None:
    processor = tiled_processor()
    first, second = (
        processor.encode(record(noise(size, seed), key=str(seed)))[0] for seed, size in enumerate(SIZES[:2])
    )
    chosen = pack([first, second]).select([1])
    alone = pack([second])
    assert torch.equal(chosen.images[DEFAULT_VIEW], alone.images[DEFAULT_VIEW])
    assert chosen.tilings == alone.tilings


def test_another_view_may_see_one_picture_an_image() -> None:
    processor = tiled_processor().with_view("teacher", ImageTransform(6))
    batch = pack(processor.encode(record(noise((31, 9)))))
    assert batch.view_tilings("teacher") is None
    assert batch.images["teacher"].shape == (1, 3, 6, 6)
    assert batch.view_tilings("absent") == batch.view_tilings(DEFAULT_VIEW)


def test_or_another_view_alone_is_tiled() -> None:
    batch = pack(small_processor().with_view("teacher", ANYRES).encode(record(noise((31, 9)))))
    assert batch.view_tilings(DEFAULT_VIEW) is None
    assert batch.images["teacher"].shape == (4, 3, 8, 8)


def test_max_length_counts_what_each_image_takes() -> None:
    sample = record(noise((31, 9)), noise((20, 20), 1))
    (encoded,) = tiled_processor().encode(sample)
    taken = sum(num_tiled_tokens(tiling, side=2) for tiling in encoded.tilings[DEFAULT_VIEW])
    length = len(encoded.input_ids) - 2 + taken
    assert tiled_processor(max_length=length).encode(sample)
    with pytest.raises(RejectedSample, match=f"{length} tokens"):
        tiled_processor(max_length=length - 1).encode(sample)
    text, images = tiled_processor().count_tokens(sample)
    assert text + 4 * images == length


def test_dropped_rounds_take_their_tiles_along() -> None:
    turns = (
        Turn("user", "<image>What?"),
        Turn("assistant", "A"),
        Turn("user", "<image>?"),
        Turn("assistant", "B " * 40),
    )
    sample = Record("k", turns, (noise((31, 9)), noise((20, 20))))
    (encoded,) = tiled_processor(max_length=60, overlong="drop_rounds").encode(sample)
    assert encoded.images[DEFAULT_VIEW].shape[0] == 4
    assert len(encoded.tilings[DEFAULT_VIEW]) == 1


def test_lengths_are_named_by_the_tiling() -> None:
    base = tiled_processor().token_hash()
    assert tiled_processor(max_length=99).token_hash() == base
    assert small_processor().token_hash() != base


def test_prompts_carry_their_tilings() -> None:
    sample = record(noise((31, 9)))
    prompt = tiled_processor().encode_prompt(sample.turns[:1], sample.images)
    assert prompt.tilings == tiled_processor().encode(sample)[0].tilings


def test_tiles_that_do_not_match_their_tiling_are_refused() -> None:
    (sample,) = tiled_processor().encode(record(noise((31, 9))))
    with pytest.raises(ValueError, match="3 tiles in view 'default'"):
        pack([dataclasses.replace(sample, images={DEFAULT_VIEW: sample.images[DEFAULT_VIEW][:3]})])
    with pytest.raises(ValueError, match="tiled in some samples"):
        pack([sample, *small_processor().encode(record(noise((8, 8)), key="plain"))])


def test_a_tiled_transform_survives_its_dict() -> None:
    transform = ImageTransform(8, mode="anyres", grids=[[1, 2], [2, 2]])
    assert ImageTransform(**transform.to_dict()) == transform


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "anyres", "grids": []}, r"grids must list \[rows, columns\]"),
        ({"mode": "anyres", "grids": [[0, 1]]}, "set processor.image.grids"),
        ({"mode": "pad", "grids": [[1, 2]]}, "grids have no effect on image mode 'pad'"),
    ],
)
def test_bad_grids_name_their_key(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTransform(8, **options)


def test_tiles_need_a_square_number_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"set processor\.num_visual_tokens"):
        tiled_processor(num_visual_tokens=5)
