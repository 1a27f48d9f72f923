"""Scenes to images: drawn four times too large, then reduced, so that edges are smooth."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moevlm.world.scenes import Scene, SceneObject
from moevlm.world.shapes import shape_mask, texture_mask
from moevlm.world.vocabulary import COLOUR_VALUES, SIZE_FRACTIONS

SUPERSAMPLING = 4
MIN_IMAGE_SIZE = 32

# Second shade of striped and dotted objects, light on dark colours and dark on light ones.
LIGHT, DARK = (255, 255, 255), (50, 30, 40)
TEXTURE_PERIODS = {"small": 4.2 / 96, "large": 5.5 / 96}  # distance of stripes or dots, as a fraction of the image
LIGHT_COLOURS = ("orange", "yellow", "pink")


def render(scene: Scene, image_size: int = 96) -> Image.Image:
    """Draw a scene as a square RGB image; the same scene and size give the same pixels.

    Args:
        scene: what to draw.
        image_size: width in pixels; labels are legible from 96 on.

    Raises:
        ValueError: the image is too small to hold an object.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {MIN_IMAGE_SIZE}, got {image_size}")
    canvas = _background(scene, image_size).resize((image_size * SUPERSAMPLING,) * 2, Image.Resampling.NEAREST)
    for item in scene.objects:
        _draw(canvas, item)
    return canvas.reduce(SUPERSAMPLING)


def _draw(canvas: Image.Image, item: SceneObject) -> None:
    size = canvas.width
    width = round(SIZE_FRACTIONS[item.size] * size)
    left, top = round(item.x * size - width / 2), round(item.y * size - width / 2)
    canvas.paste(COLOUR_VALUES[item.colour], (left, top), shape_mask(item.category, width))
    if item.texture != "plain":
        shade = DARK if item.colour in LIGHT_COLOURS else LIGHT
        period = TEXTURE_PERIODS[item.size] * size
        canvas.paste(shade, (left, top), texture_mask(item.category, item.texture, width, period))
    if item.label is not None:
        letters, halo = _label_masks(item.label, size)
        corner = (round(item.x * size - halo.width / 2), round(item.y * size - halo.height / 2))
        canvas.paste((255, 255, 255), corner, halo)
        canvas.paste((0, 0, 0), corner, letters)


@lru_cache(maxsize=256)
def _label_masks(label: str, size: int) -> tuple[Image.Image, Image.Image]:
    """Masks of the bold letters of a label, a tenth of the image high, and of the halo around them."""
    unit = size / 96
    font = ImageFont.load_default(size=11.5 * unit)
    bold, halo = max(1, round(0.3 * unit)), max(2, round(1.3 * unit))
    left, top, right, bottom = font.getbbox(label, stroke_width=halo)
    masks = []
    for stroke in (bold, halo):
        mask = Image.new("L", (round(right - left), round(bottom - top)), 0)
        ImageDraw.Draw(mask).text((-left, -top), label, fill=255, font=font, stroke_width=stroke)
        masks.append(mask)
    return masks[0], masks[1]


def _background(scene: Scene, image_size: int) -> Image.Image:
    """A light grey with a faint tint, and little contrast within it."""
    rng = np.random.default_rng(scene.background_seed)
    base = rng.uniform(168, 205) + rng.uniform(-10, 10, size=3)
    strength, angle = rng.uniform(8, 16), rng.uniform(0, 2 * np.pi)
    coordinates = np.linspace(-1, 1, image_size)
    if scene.background == "gradient":
        pattern = np.cos(angle) * coordinates[None, :] + np.sin(angle) * coordinates[:, None]
    elif scene.background == "checker":
        squares = np.arange(image_size) * 12 // image_size
        pattern = ((squares[None, :] + squares[:, None]) % 2) - 0.5
    elif scene.background == "noise":
        pattern = rng.uniform(-1, 1, size=(image_size, image_size))
    else:
        pattern = np.zeros((image_size, image_size))
    pixels = base[None, None, :] + strength * pattern[:, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")
