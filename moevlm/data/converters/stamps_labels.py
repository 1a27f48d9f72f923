"""What the folders of the Tux Paint stamps say about a picture: its category, its group, its style.

The package files every stamp under a subject (``animals/birds/crow.png``). The tables below turn such folders into
answers and withhold them where a folder says less than it seems to: a teddy bear under ``animals`` is no animal, a tyre
under ``vehicles`` is no vehicle. A picture without a category still has a description and its measured properties.
"""

import re

# Folder -> category; the longest folder that fits wins, None withholds the category.
CATEGORY_BY_FOLDER: dict[str, str | None] = {
    "animals": "animal",
    "animals/mammals/bears/cartoon": None,  # toys
    "animals/mammals/bears/toys": None,
    "clothes": "clothing",
    "food": "food",
    "hobbies/music": "musical instrument",
    "household": "household item",
    "military/vehicles": "vehicle",
    "plants": "plant",
    "plants/flowers/plastic": None,
    "plants/mushrooms": None,
    "space": "space object",
    "symbols/alphabets": "letter",
    "symbols/alphabets/asl": "hand sign",
    "symbols/chess": "chess piece",
    "symbols/math": "number",
    "symbols/math/operators": "mathematical sign",
    "symbols/money": "coin",
    "symbols/money/00_symbols": None,
    "symbols/music": "musical sign",
    "town/houses": "building",
    "town/roadsigns": "road sign",
    "vehicles": "vehicle",
}

# Pictures that are not what their folder is named after; file names without suffix and without "_mirror".
WITHOUT_CATEGORY = frozenset(
    {
        "animals/insects/cartoon/spider_computer",
        "animals/insects/cartoon/wings",
        "clothes/button",
        "clothes/clothespin_new",
        "clothes/clothespin_old",
        "military/vehicles/ww2_german_gun",
        "space/spacewalk",
        "town/houses/cartoon/cave_entrance",
        "town/houses/cartoon/circus",
        "town/houses/cartoon/city",
        "town/houses/cartoon/medieval_tent",
        "town/houses/cartoon/tent",
        "town/houses/cartoon/tepee",
        "town/roadsigns/railroad_crossing",
        "town/roadsigns/stoplight_01_red",
        "town/roadsigns/stoplight_02_yellow",
        "town/roadsigns/stoplight_03_green",
        "town/roadsigns/traffic_cone",
        "vehicles/7spoke256",
        "vehicles/emergency/sedan_police",
        "vehicles/farming/cartoon/tux_tractor",
        "vehicles/flight/planes/cartoon/plane",
        "vehicles/locomotive/cartoon/trainSign",
        "vehicles/wheel_tractor",
    }
)

# How a question names a category.
PHRASES = {
    "animal": "an animal",
    "building": "a building",
    "chess piece": "a chess piece",
    "clothing": "clothing",
    "coin": "a coin",
    "food": "food",
    "hand sign": "a hand sign",
    "household item": "a household item",
    "letter": "a letter",
    "mathematical sign": "a mathematical sign",
    "musical instrument": "a musical instrument",
    "musical sign": "a musical sign",
    "number": "a number",
    "plant": "a plant",
    "road sign": "a road sign",
    "space object": "a space object",
    "vehicle": "a vehicle",
}

# Categories that pictures of a category may show besides their own, or be mistaken for by a fair judge: grass under a
# tiger, writing on a coin, an O that is a zero. Questions never deny these.
MAY_ALSO_SHOW: dict[str, frozenset[str]] = {
    "animal": frozenset({"food", "plant"}),
    "building": frozenset({"household item", "plant", "vehicle"}),
    "chess piece": frozenset({"animal", "household item"}),
    "clothing": frozenset({"animal", "household item"}),
    "coin": frozenset({"animal", "building", "letter", "number", "plant"}),
    "food": frozenset({"household item", "plant"}),
    "hand sign": frozenset({"letter", "number"}),
    "household item": frozenset(
        {"animal", "clothing", "food", "letter", "musical instrument", "number", "plant", "vehicle"}
    ),
    "letter": frozenset({"mathematical sign", "number"}),
    "mathematical sign": frozenset({"letter", "number"}),
    "musical instrument": frozenset({"household item"}),
    "musical sign": frozenset({"letter"}),
    "number": frozenset({"letter", "mathematical sign"}),
    "plant": frozenset({"food"}),
    "road sign": frozenset({"letter", "number"}),
    "space object": frozenset({"vehicle"}),
    "vehicle": frozenset({"household item", "letter", "number", "space object"}),
}

# Folder -> (kind of question, answer).
GROUP_BY_FOLDER = {
    "animals/birds": ("animal_group", "bird"),
    "animals/fish": ("animal_group", "fish"),
    "animals/insects": ("animal_group", "insect"),
    "animals/mammals": ("animal_group", "mammal"),
    "animals/marsupials": ("animal_group", "mammal"),
    "food/fruit": ("food_group", "fruit"),
    "food/vegetables": ("food_group", "vegetable"),
}

# Spiders, snails, slugs and woodlice are no insects, lobsters and shrimps no fish, mushrooms no vegetables.
WITHOUT_GROUP = re.compile(
    r"animals/insects/(Brown_slug|Woodlouse|cartoon/(spider|snail|wings))|animals/fish/(lobster|shrimp)"
    r"|food/vegetables/mushroom"
)

STYLE_BY_FOLDER = {"filled": "filled", "outlined": "outlined"}  # of letters, any parent folder

# Categories in which two different descriptions are never true of one picture.
EXCLUSIVE_CATEGORIES = frozenset(
    {"chess piece", "coin", "hand sign", "letter", "mathematical sign", "musical sign", "number"}
)

_TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "..."})
_NAME = re.compile(r"(?:An?|The|Some|Two)\s+([\w'\" -]{2,40}?)[.!]?")
_PORTION = re.compile(r"^(?:pair|bunch|head|string|couple|cluster|quarter|glass|plant) of (?:common )?")


def base_name(path: str) -> str:
    """``a/b_mirror.png`` -> ``a/b``: the stamp that a file belongs to, without suffix."""
    return path.rsplit(".", 1)[0].removesuffix("_mirror")


def _longest(path: str, table: dict[str, str | None]) -> str | None:
    folders = [folder for folder in table if path.startswith(folder + "/")]
    return table[max(folders, key=len)] if folders else None


def category_of(path: str) -> str | None:
    """The category that the folders of ``path`` assert, or None where they assert none."""
    return None if base_name(path) in WITHOUT_CATEGORY else _longest(path, CATEGORY_BY_FOLDER)


def group_of(path: str) -> tuple[str, str] | None:
    """(kind, answer) of the finer question that the folders of ``path`` answer, e.g. ("food_group", "fruit")."""
    if category_of(path) is None or WITHOUT_GROUP.match(path):
        return None
    return next((value for folder, value in GROUP_BY_FOLDER.items() if path.startswith(folder + "/")), None)


def style_of(path: str) -> str | None:
    """Whether a letter is "filled" or "outlined"."""
    if category_of(path) != "letter":
        return None
    return next((STYLE_BY_FOLDER[part] for part in path.split("/") if part in STYLE_BY_FOLDER), None)


def plain_text(description: str) -> str:
    """The description with typographic quotes and dashes written plainly; other letters stay as they are."""
    return re.sub(r"\s*[\u2013\u2014]\s*", " - ", description.translate(_TYPOGRAPHY)).strip(" -")


def name_of(description: str) -> str | None:
    """The thing's short name: "An electric guitar." -> "electric guitar"; None unless it is a short noun phrase."""
    match = _NAME.fullmatch(re.sub(r"\s*\([^)]*\)", "", description))
    if match is None or len(match[1].split()) > 4:
        return None
    return _PORTION.sub("", match[1])


def may_deny(pictured: str, asked: str) -> bool:
    """Whether "no" is a true answer to "Is there <asked>?" about a picture of category ``pictured``."""
    return asked != pictured and asked not in MAY_ALSO_SHOW[pictured]
