"""Image files to normalised tensors: one transform for training, evaluation and serving."""

from __future__ import annotations

import dataclasses
import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from torch import Tensor

from moevlm.batch import PixelScale, Tiling
from moevlm.preprocessing.fast_images import (
    TORCH_MODES,
    decode_jpeg,
    decode_jpeg_image,
    plain_jpeg_size,
    resize_in_torch,
)
from moevlm.preprocessing.rejection import RejectedSample
from moevlm.preprocessing.tiles import check_grids, cut, tiling_of

MODES = ("pad", "square", "stretch", "anyres")
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
RESIZERS = ("pil", "torch")
MAX_PIXELS = 89_478_485
"""Pillow's own threshold of a suspected decompression bomb; larger images are refused before they are decoded."""
MAX_ASPECT_RATIO = 200
"""Of the longer to the shorter side, as in `moevlm.data.image_files`."""

ORIENTATION_TAG = 0x0112  # EXIF

ImageSource = bytes | Image.Image

with warnings.catch_warnings():  # torch says once that it cannot protect bytes; levels are copied and never written
    warnings.simplefilter("ignore")
    torch.frombuffer(b"0", dtype=torch.uint8)


def decode_image(source: ImageSource, least_side: int | None = None) -> Image.Image:
    """An upright 8-bit RGB image.

    EXIF rotation is applied, CMYK, palette and grey images are converted, 16-bit grey is scaled to 8 bits, transparency
    is dropped (as LLaVA does).

    Args:
        least_side: decode a JPEG smaller, as long as its shorter side keeps so many pixels (draft scaling).

    Raises:
        RejectedSample: unreadable_image, animated_image, image_too_large, image_too_elongated, unsupported_image_mode.
    """
    picture = _decode(source, least_side)
    assert isinstance(picture, Image.Image)
    return picture


def _decode(source: ImageSource, least_side: int | None, *, as_array: bool = False) -> Image.Image | np.ndarray:
    """`decode_image`; with `as_array` an array [H, W, 3] where that is the shorter way."""
    least = None if least_side is None else (least_side, least_side)
    decode = decode_jpeg if as_array else decode_jpeg_image
    with _named_faults():
        size = plain_jpeg_size(source) if isinstance(source, bytes) else None
        if isinstance(source, bytes) and size is not None:
            _check_size(*size)
            pixels = decode(source, least)
            if pixels is not None:
                return pixels
        image = _open(source)
        if isinstance(source, bytes) and image.format == "JPEG" and image.mode == "RGB":
            pixels = decode(source, least) if image.getexif().get(ORIENTATION_TAG, 1) == 1 else None
            if pixels is not None:
                return pixels
        image.load()
        upright = ImageOps.exif_transpose(image)
    return _to_rgb(upright if upright is not None else image)


def upright_size(source: ImageSource) -> tuple[int, int]:
    """Height and width of what `decode_image` would give, read from the file's header.

    Raises:
        RejectedSample: as `decode_image`, as far as the header shows it.
    """
    with _named_faults():
        image = _open(source)
        is_turned = image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if is_turned else (image.height, image.width)


def encoder_settings(name: str) -> dict[str, Any]:
    """What a timm model was trained with: `image_size`, `mean`, `std` and `interpolation` of an `ImageTransform`.

    Raises:
        ValueError: timm does not know the model, or says nothing about its images.
    """
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a weights tag that the architecture does not have
        config = None
    if config is None or not config.mean:
        raise ValueError(
            f"timm does not say how {name!r} wants its images; set processor.image.encoder to a name of "
            "timm.list_pretrained(), or processor.image.image_size, mean and std instead"
        )
    return {
        "image_size": config.input_size[1],
        "mean": list(config.mean),
        "std": list(config.std),
        "interpolation": config.interpolation,
    }


def _check_size(height: int, width: int) -> None:
    if width * height > MAX_PIXELS:
        raise RejectedSample("image_too_large", f"{width} x {height} pixels, at most {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RejectedSample("image_too_elongated", f"{width} x {height}, at most {MAX_ASPECT_RATIO} to 1")


def _open(source: ImageSource) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bombs and damaged metadata: the former are refused below
        image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
    _check_size(image.height, image.width)
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a photograph and its previews
        raise RejectedSample("animated_image", f"{getattr(image, 'n_frames', 0)} frames")
    return image


@contextmanager
def _named_faults() -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as error:
        raise RejectedSample("image_too_large", str(error)) from error
    except RejectedSample:
        raise
    except Exception as error:  # decoders of hostile files raise nearly anything
        raise RejectedSample("unreadable_image", str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel; Image.convert would clip everything above 255 to white
        grey_HW = np.asarray(image).astype(np.int64)
        if grey_HW.min() < 0 or grey_HW.max() > 65535:
            raise RejectedSample("unsupported_image_mode", f"mode {image.mode} with values outside 16 bits")
        image = Image.fromarray((grey_HW // 257).astype(np.uint8))
    elif image.mode == "F":
        raise RejectedSample("unsupported_image_mode", "floating-point pixels")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _as_levels(picture: Image.Image | np.ndarray) -> Tensor:
    """[H, W, 3] uint8; channels stay last in memory, so that pictures are joined by plain copies."""
    if isinstance(picture, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(picture))
    return torch.frombuffer(picture.tobytes(), dtype=torch.uint8).view(picture.height, picture.width, 3)


@dataclass(frozen=True)
class ImageTransform:
    """Resize and normalise: ``(pixel / 255 - mean) / std``, float32.

    Modes: `pad` centres the image on a square of the mean colour (LLaVA-1.5), `square` scales the short side and crops
    the centre (CLIP), `stretch` ignores the aspect ratio (SigLIP). PIL resizes, with antialiasing.

    `resizer` `torch` resizes bicubic and bilinear at twice the rate of `pil`, within one of 255 levels of it. `draft`
    decodes large JPEGs at a fraction of their size, which changes pixels by about a level in the mean; not with tiles.

    `anyres` (LLaVA-NeXT) shows an image as an overview and as many tiles of `image_size` as the best of `grids`
    ([rows, columns] each; None: LLaVA-1.6's list) has; the model's connector must be of an ``anyres_`` kind.
    """

    image_size: int
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    mode: str = "pad"
    interpolation: str = "bicubic"
    grids: Sequence[Sequence[int]] | None = None
    resizer: str = "pil"
    draft: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.mode not in MODES:
            raise ValueError(
                f"image mode must be one of {', '.join(MODES)}, got {self.mode!r}; set processor.image.mode"
            )
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(
                f"interpolation must be one of {known}, got {self.interpolation!r}; set processor.image.interpolation"
            )
        if self.resizer not in RESIZERS:
            known = ", ".join(RESIZERS)
            raise ValueError(f"resizer must be one of {known}, got {self.resizer!r}; set processor.image.resizer")
        if self.draft and self.is_tiled:
            raise ValueError("tiles need every pixel; set processor.image.draft=false or another processor.image.mode")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}; set processor.image.image_size")
        if self.is_tiled:
            object.__setattr__(self, "grids", check_grids(self.grids))
        elif self.grids is not None:
            raise ValueError(f"grids have no effect on image mode {self.mode!r}; set processor.image.mode to anyres")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"mean and std need 3 values, std > 0; got {self.mean}, {self.std}; set processor.image.mean, image.std"
            )

    @property
    def is_tiled(self) -> bool:
        """Whether an image becomes several pictures."""
        return self.mode == "anyres"

    def __call__(self, source: ImageSource) -> Tensor:
        """[3, image_size, image_size] float32 from an encoded file or a PIL image; of a tiled one, the overview."""
        return self.scale.normalise(self._levels(source).permute(2, 0, 1))

    @functools.cached_property
    def scale(self) -> PixelScale:
        """How levels become what the encoder sees."""
        return PixelScale(tuple(self.mean), tuple(self.std))

    def stack(self, sources: Sequence[ImageSource]) -> tuple[Tensor, tuple[Tiling, ...] | None]:
        """All images of a sample, as levels: `scale` normalises them.

        Returns:
            [n, 3, image_size, image_size] uint8 and None; of a tiled transform [m, 3, image_size, image_size], overview
            and tiles image by image, and how each of the n images is tiled. n may be 0.
        """
        pictures: list[Tensor] = []
        tilings: list[Tiling] = []
        for source in sources:
            if not self.is_tiled:
                pictures.append(self._levels(source))
                continue
            image = decode_image(source)
            tilings.append(self.tiling((image.height, image.width)))
            resampling = INTERPOLATIONS[self.interpolation]
            tiles = cut(image, tilings[-1], tile_size=self.image_size, resampling=resampling)
            pictures += [_as_levels(tile) for tile in tiles]
        if len(pictures) == 1:
            levels_MHW3 = pictures[0].unsqueeze(0)
        elif pictures:
            levels_MHW3 = torch.stack(pictures)
        else:
            levels_MHW3 = torch.empty(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
        return levels_MHW3.permute(0, 3, 1, 2), tuple(tilings) if self.is_tiled else None

    def tiling(self, size: tuple[int, int]) -> Tiling:
        """How an image of this height and width is tiled; of a tiled transform only."""
        assert self.grids is not None
        return tiling_of(*size, self.grids, tile_size=self.image_size)

    def _levels(self, source: ImageSource) -> Tensor:
        """[image_size, image_size, 3] uint8."""
        picture = _decode(source, self.image_size if self.draft else None, as_array=self.resizer == "torch")
        height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)
        resampling, side = INTERPOLATIONS[self.interpolation], max(height, width)
        is_bomb = self.mode == "pad" and side * side > MAX_PIXELS  # a long, thin image as a square
        if self.resizer == "torch" and resampling in TORCH_MODES and not is_bomb:
            return _as_levels(self._resize_array(np.array(picture) if isinstance(picture, Image.Image) else picture))
        return _as_levels(self._resize(Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture))

    def _resize_array(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """What `_resize` does, in torch."""
        size, resampling, (height, width) = self.image_size, INTERPOLATIONS[self.interpolation], pixels_HW3.shape[:2]
        if self.mode == "square":
            tall, wide = (size * side // min(height, width) for side in (height, width))
            top, left = (tall - size) // 2, (wide - size) // 2
            resized = resize_in_torch(pixels_HW3, (tall, wide), resampling)
            return resized[top : top + size, left : left + size]
        if self.mode == "pad" and width != height:
            side = max(width, height)
            square = np.empty((side, side, 3), dtype=np.uint8)
            square[:] = [int(255 * value) for value in self.mean]
            top, left = (side - height) // 2, (side - width) // 2
            square[top : top + height, left : left + width] = pixels_HW3
            pixels_HW3 = square
        is_done = pixels_HW3.shape[:2] == (size, size)
        return pixels_HW3 if is_done else resize_in_torch(pixels_HW3, (size, size), resampling)

    def _resize(self, image: Image.Image) -> Image.Image:
        size, resampling = self.image_size, INTERPOLATIONS[self.interpolation]
        if self.mode == "square":
            short = min(image.size)
            width, height = (size * side // short for side in image.size)  # rounded down, as CLIP's own processor does
            left, top = (width - size) // 2, (height - size) // 2
            resized = image.resize((width, height), resampling)
            return resized.crop((left, top, left + size, top + size))
        if self.mode == "pad" and image.width != image.height:
            side = max(image.size)
            if side * side > MAX_PIXELS:  # a long, thin image: its square would be a bomb that the image is not
                shrink = 8 * size / side if 8 * size < side else 1.0
                image = image.resize([max(1, round(length * shrink)) for length in image.size], resampling)
                side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in self.mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        return image if image.size == (size, size) else image.resize((size, size), resampling)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `ImageTransform(**values)` takes them."""
        values = dataclasses.asdict(self)
        grids = {} if self.grids is None else {"grids": [list(grid) for grid in self.grids]}
        values.pop("grids")
        for name, default in (("resizer", "pil"), ("draft", False)):
            if values[name] == default:  # files of models say only what differs
                values.pop(name)
        return {**values, "mean": list(self.mean), "std": list(self.std), **grids}
