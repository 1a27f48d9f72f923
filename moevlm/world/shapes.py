"""The silhouettes of the categories and the patterns of the textures, as masks of any size."""

import math
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter

Point = tuple[float, float]


def _star() -> list[Point]:
    radii = [1.05, 0.45] * 5
    angles = [-math.pi / 2 + i * math.pi / 5 for i in range(10)]
    return [(r * math.cos(a), r * math.sin(a) + 0.08) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[Point]:
    angles = [2 * math.pi * i / 60 for i in range(60)]
    heights = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in angles]
    return [(math.sin(t) ** 3, -(h + 2.5) / 14.5) for t, h in zip(angles, heights, strict=True)]


# Outlines on [-1, 1] x [-1, 1], y downwards; circle, ring and moon are drawn from ellipses instead.
POLYGONS: dict[str, list[Point]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.98), (1, 0.88), (-1, 0.88)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        (-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
        (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34),
    ],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "arrow": [(-1, -0.42), (0, -0.42), (0, -1), (1, 0), (0, 1), (0, 0.42), (-1, 0.42)],
    "house": [
        (0, -1), (1, -0.1), (0.72, -0.1), (0.72, 0.95), (0.24, 0.95), (0.24, 0.35),
        (-0.24, 0.35), (-0.24, 0.95), (-0.72, 0.95), (-0.72, -0.1), (-1, -0.1),
    ],
    "tree": [
        (0, -1), (0.5, -0.38), (0.28, -0.38), (0.8, 0.18), (0.5, 0.18), (0.98, 0.62), (0.2, 0.62),
        (0.2, 1), (-0.2, 1), (-0.2, 0.62), (-0.98, 0.62), (-0.5, 0.18), (-0.8, 0.18), (-0.28, -0.38), (-0.5, -0.38),
    ],
}  # fmt: skip


@lru_cache(maxsize=1024)
def shape_mask(category: str, width: int) -> Image.Image:
    """Silhouette of a category as a ``width`` x ``width`` mask (mode L): 255 inside, 0 outside."""
    mask = Image.new("L", (width, width), 0)
    draw = ImageDraw.Draw(mask)
    if category in POLYGONS:
        scale = (width - 1) / 2
        draw.polygon([((x + 1) * scale, (y + 1) * scale) for x, y in POLYGONS[category]], fill=255)
        return mask
    draw.ellipse((0, 0, width - 1, width - 1), fill=255)
    if category == "ring":
        draw.ellipse((0.27 * width, 0.27 * width, 0.73 * width, 0.73 * width), fill=0)
    elif category == "moon":
        draw.ellipse((0.34 * width, -0.06 * width, 1.16 * width, 0.76 * width), fill=0)
    return mask


@lru_cache(maxsize=1024)
def texture_mask(category: str, texture: str, width: int, period: float) -> Image.Image:
    """Where the second shade of a texture lies inside a silhouette; empty for ``plain``.

    Stripes are diagonal. ``period`` is the distance of stripes or dots in pixels. A rim stays free of texture, so that
    the silhouette is never broken up.
    """
    pattern = Image.new("L", (width, width), 0)
    draw = ImageDraw.Draw(pattern)
    steps = math.ceil(width / period) + 1
    if texture == "striped":
        for step in range(-steps, 2 * steps):
            left = step * period * math.sqrt(2)
            half = 0.25 * period * math.sqrt(2)
            top, bottom = (left - half, left + half), (left + half - width, left - half - width)
            draw.polygon([(top[0], 0), (top[1], 0), (bottom[0], width), (bottom[1], width)], fill=255)
    elif texture == "dotted":
        radius = 0.29 * period
        for row in range(-steps, steps):
            for column in range(-steps, steps):
                x = width / 2 + (column + 0.5 * (row % 2)) * period
                y = width / 2 + row * period * 0.87
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    rim = 2 * round(0.16 * period) + 1
    return ImageChops.multiply(pattern, shape_mask(category, width).filter(ImageFilter.MinFilter(rim)))
