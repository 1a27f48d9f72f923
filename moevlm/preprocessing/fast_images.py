"""Faster ways to the pixels of an image: libjpeg-turbo without Pillow between, antialiased resizing in torch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

FRAMES = (0xC0, 0xC1, 0xC2)  # markers of the frame header: baseline, extended, progressive
TABLES = (0xC4, 0xDB, 0xDD, 0xFE)  # Huffman tables, quantisation, restart interval, comment
TORCH_MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}


def decode_jpeg(data: bytes, least_size: tuple[int, int] | None = None, *, colours: str = "RGB") -> np.ndarray | None:
    """An RGB JPEG's pixels [H, W, 3], the same that Pillow gives; None where Pillow should judge the file.

    Args:
        colours: "RGBX" gives [H, W, 4], as Pillow keeps its pictures.
        least_size: height and width that are enough: the file is decoded at 1/8 ... 7/8 of its size when that leaves so
            much (draft scaling, in the decoder's own frequency domain; the pixels are not those of a later resize).
    """
    height, width = least_size or (0, 0)
    try:
        pixels_HW3: np.ndarray = simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width)
    except (ValueError, RuntimeError):
        return None
    return pixels_HW3


def decode_jpeg_image(data: bytes, least_size: tuple[int, int] | None = None) -> Image.Image | None:
    """`decode_jpeg` as an image of Pillow, which looks at the decoder's memory instead of copying it."""
    arrow = _arrow()
    pixels = decode_jpeg(data, least_size, colours="RGB" if arrow is None else "RGBX")
    if pixels is None or arrow is None:
        return None if pixels is None else Image.fromarray(pixels)
    flat = arrow.Array.from_buffers(arrow.uint8(), pixels.size, [None, arrow.py_buffer(pixels)])
    return Image.fromarrow(arrow.FixedSizeListArray.from_arrays(flat, 4), "RGB", (pixels.shape[1], pixels.shape[0]))


@functools.cache
def _arrow() -> Any:
    """pyarrow, the public way to hand memory to Pillow; None where either is too old, and pixels are copied."""
    try:
        import pyarrow
    except ImportError:
        return None
    return pyarrow if hasattr(Image, "fromarrow") else None


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a colour JPEG that its pixels alone describe; None for any other file.

    One with EXIF may have to be turned, one with an index of pictures (MPF) holds several: these are Pillow's, which
    reads headers at a tenth of the rate. The segments before the frame are walked; whatever is odd about them is None.
    """
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 < len(data) and data[place] == 0xFF:
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in FRAMES:
            height, width = (int.from_bytes(data[place + at : place + at + 2], "big") for at in (5, 7))
            return (height, width) if data[place + 9] == 3 and height and width else None
        if not (0xE0 <= marker <= 0xEF or marker in TABLES) or size < 2:
            return None
        if data[place + 4 : place + 8] in (b"Exif", b"MPF\0"):
            return None
        place += 2 + size
    return None


def resize_in_torch(pixels_HW3: np.ndarray, size: tuple[int, int], resampling: Image.Resampling) -> np.ndarray:
    """A picture of another height and width, antialiased; bicubic and bilinear only.

    Values differ from Pillow's by at most one of 255 levels, rounding.
    """
    picture_1HW3 = torch.from_numpy(pixels_HW3).unsqueeze(0)
    resized_13HW = torch.nn.functional.interpolate(
        picture_1HW3.permute(0, 3, 1, 2), size=size, mode=TORCH_MODES[resampling], antialias=True
    )
    return resized_13HW[0].permute(1, 2, 0).numpy()  # channels stay last in memory
