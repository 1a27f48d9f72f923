"""Stamps as pictures: reading, plain background, measured colour and proportion, look-alikes, splits."""

import colorsys
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moevlm.data.converters.stamps_labels import base_name, category_of, plain_text

BACKGROUND = (225, 225, 225)  # light grey: white things stay visible
MARGIN_FRACTION = 0.06  # of the thing's long side, on every side of it
VISIBLE_ALPHA, SOLID_ALPHA = 16, 128
COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
UNCLEAR = "unclear"
SPLITS = ("train", "validation", "test")

# Two pictures count as one for splitting when their thumbnails differ by less than this fraction; files of one folder
# whose names share the first word (dreydl-hay, dreydl-nun) already do at the second.
SAME_PICTURE, SAME_SERIES = 0.22, 0.35
THUMBNAIL_SIZE = 16


@dataclasses.dataclass
class Stamp:
    """One picture of the package with what is known about it."""

    path: str  # relative to the stamps folder, with suffix
    description: str
    image: Image.Image  # RGB, square, on the plain background
    content_hash: str  # sha256 of the source file
    thumbnail: NDArray[np.float32]  # (THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3), minus the background
    colour: str | None  # main colour where there is a clear one
    shape: str | None  # "wide", "tall" or "square" where that is clear
    group: int = -1  # equal for pictures of one subject
    split: str = ""

    @property
    def category(self) -> str | None:
        return category_of(self.path)


def read_stamp(root: Path, path: str, *, image_size: int) -> Stamp:
    """Read one stamp and its description.

    Raises:
        ValueError: the picture cannot be read, shows nothing, or has no description; the message says which.
    """
    file = root / path
    try:
        with Image.open(file) as opened:
            rgba = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable picture: {error}".replace(str(root), "").strip()) from error
    alpha = rgba.getchannel("A")
    box = alpha.point([255 if value >= VISIBLE_ALPHA else 0 for value in range(256)]).getbbox()
    if box is None:
        raise ValueError("empty picture: every pixel is transparent")
    description = _read_description(root / (base_name(path) + ".txt"))
    rgba = rgba.crop(box)
    cut_out = int(np.asarray(alpha).min()) < VISIBLE_ALPHA  # else the frame, not a thing, would be measured
    image = on_background(rgba, image_size=image_size)
    thumbnail = image.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    return Stamp(
        path=path,
        description=description,
        image=image,
        content_hash=hashlib.sha256(file.read_bytes()).hexdigest(),
        thumbnail=np.asarray(thumbnail, dtype=np.float32) - np.array(BACKGROUND, dtype=np.float32),
        colour=main_colour(rgba) if cut_out else None,
        shape=proportion(rgba) if cut_out else None,
    )


def _read_description(file: Path) -> str:
    """The first line of a stamp's text file is English; the lines below it are translations."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"no description: {file.name} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"unreadable description: {file.name} is not UTF-8 text") from error
    description = plain_text(lines[0]) if lines else ""
    if not description:
        raise ValueError(f"no description: the first line of {file.name} is empty")
    return description


def on_background(rgba: Image.Image, *, image_size: int) -> Image.Image:
    """Centre a cut-out on a square of BACKGROUND, at most ``image_size`` wide; small ones are not enlarged."""
    rgba = rgba.copy()
    inner = round(image_size / (1 + 2 * MARGIN_FRACTION))
    rgba.thumbnail((inner, inner), Image.Resampling.LANCZOS, reducing_gap=None)
    side = min(image_size, max(rgba.size) + 2 * max(1, round(MARGIN_FRACTION * max(rgba.size))))
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2), rgba)
    return square


def proportion(rgba: Image.Image) -> str | None:
    """Say "wide" from 1.3 times wider than tall on, "tall" the other way round, "square" within 1.1; None between."""
    ratio = rgba.width / rgba.height
    if max(ratio, 1 / ratio) <= 1.1:
        return "square"
    if max(ratio, 1 / ratio) < 1.3:
        return None
    return "wide" if ratio > 1 else "tall"


def colour_name(red: int, green: int, blue: int) -> str:
    """Name of one colour, by brightness, saturation and hue; ours, chosen to agree with everyday names."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    degrees = hue * 360
    if value < 0.22:
        return "black"
    if saturation < 0.16 or (saturation < 0.25 and value < 0.4):
        return "white" if value > 0.82 else ("black" if value < 0.28 else "grey")
    if 14 <= degrees < 68 and saturation < 0.4 and value > 0.8:
        return UNCLEAR  # cream and beige: neither white nor yellow nor brown to everybody
    if degrees < 14 or degrees >= 345:
        if value > 0.8 and saturation < 0.55:
            return "pink"
        return "red" if saturation > 0.55 and value > 0.35 else "brown"
    if degrees < 45:
        return "orange" if saturation > 0.6 and value > 0.75 else "brown"
    if degrees < 68:
        return "yellow" if value > 0.6 and saturation > 0.4 else "brown"
    if degrees < 170:
        return "green"
    if degrees < 255:
        return "blue"
    return "purple" if degrees < 300 else "pink"


_STEP = 8  # colours are named on a grid of this width, once
_MIDDLES = range(_STEP // 2, 256, _STEP)
_NAMES = (*COLOURS, UNCLEAR)
_GRID = np.array([[[_NAMES.index(colour_name(r, g, b)) for b in _MIDDLES] for g in _MIDDLES] for r in _MIDDLES])


def main_colour(rgba: Image.Image) -> str | None:
    """The colour of at least half of the solid pixels, if no other colour covers more than half as many."""
    small = rgba.copy()
    small.thumbnail((64, 64), Image.Resampling.BOX)
    pixels = np.asarray(small).reshape(-1, 4)
    solid = pixels[pixels[:, 3] >= SOLID_ALPHA][:, :3] // _STEP
    if len(solid) == 0:
        return None
    counts = np.bincount(_GRID[solid[:, 0], solid[:, 1], solid[:, 2]], minlength=len(_NAMES))
    second, first = np.sort(counts)[-2:]
    name = _NAMES[int(counts.argmax())]
    return name if name != UNCLEAR and first >= len(solid) / 2 and second <= first / 2 else None


def subject_key(path: str) -> str:
    """Files that show one subject share this: mirrored, numbered, filled and outlined, photographed and drawn."""
    stem = base_name(path).lower().rpartition("/")[2]
    stem = re.sub(r"[-_](photo|outlined?|filled|silo)(?=[-_]|$)|_with_.*", "", stem)
    numberless = re.sub(r"[-_ ]?\d+[a-z]?$", "", stem)
    return numberless if len(numberless) > 1 else stem


def group_by_subject(stamps: Sequence[Stamp]) -> list[int]:
    """A group number per stamp: one group for equal subjects, equal descriptions and look-alikes, also mirrored."""
    parent = list(range(len(stamps)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[str, int] = {}
    for index, stamp in enumerate(stamps):
        for key in (f"file {subject_key(stamp.path)}", f"text {stamp.description.casefold()}"):
            parent[root(index)] = root(first.setdefault(key, index))
    for one, other in _look_alikes(stamps):
        parent[root(one)] = root(other)
    return [root(index) for index in range(len(stamps))]


def _look_alikes(stamps: Sequence[Stamp]) -> Iterable[tuple[int, int]]:
    """Pairs whose thumbnails, one of them perhaps mirrored, differ by a small fraction of the brighter one's norm."""
    if not stamps:
        return
    plain = np.stack([stamp.thumbnail.ravel() for stamp in stamps])
    mirrored = np.stack([stamp.thumbnail[:, ::-1].ravel() for stamp in stamps])
    norms = np.linalg.norm(plain, axis=1) + 1e-6
    series = [_series(stamp.path) for stamp in stamps]
    for i in range(len(stamps) - 1):
        rest = slice(i + 1, None)
        distances = [np.linalg.norm(view[rest] - plain[i], axis=1) for view in (plain, mirrored)]
        difference = np.minimum(*distances) / np.maximum(norms[rest], norms[i])
        for j in np.nonzero(difference < SAME_SERIES)[0]:
            if difference[j] < SAME_PICTURE or (series[i] is not None and series[i] == series[i + 1 + j]):
                yield i, i + 1 + int(j)


def _series(path: str) -> str | None:
    """Folder and first word of the file name; None for words under four letters (``t_sock``, ``asl_a``)."""
    folder, _, stem = base_name(path).rpartition("/")
    word = re.split(r"[-_]", stem)[0]
    return f"{folder}/{word}" if len(word) > 3 and word.isalpha() else None


def assign_splits(stamps: Sequence[Stamp], *, seed: int, validation_fraction: float, test_fraction: float) -> None:
    """Set ``group`` and ``split``, so that no subject is in two splits and every category is in all, if it can be.

    Within a category the subjects are ordered by a hash of the seed and their smallest content hash. The middle of a
    subject's pictures on that line, as a fraction of its length, decides: first test, then validation, then train.
    """
    members: dict[int, list[Stamp]] = {}
    for stamp, group in zip(stamps, group_by_subject(stamps)):
        stamp.group = group
        members.setdefault(group, []).append(stamp)
    strata: dict[str, list[tuple[str, list[Stamp]]]] = {}
    for subject in members.values():
        smallest = min(stamp.content_hash for stamp in subject)
        category = min((stamp.path, stamp.category or "") for stamp in subject)[1]
        order = hashlib.sha256(f"{seed} {smallest}".encode()).hexdigest()
        strata.setdefault(category, []).append((order, subject))
    for stratum in strata.values():
        total, before = sum(len(subject) for _, subject in stratum), 0
        for _, subject in sorted(stratum, key=lambda entry: entry[0]):
            middle = (before + len(subject) / 2) / total
            before += len(subject)
            held_out = middle < test_fraction + validation_fraction
            for stamp in subject:
                stamp.split = "test" if middle < test_fraction else "validation" if held_out else "train"
