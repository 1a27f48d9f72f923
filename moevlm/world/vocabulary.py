"""What the miniature world is made of: every class list, and the biases its scenes are drawn with.

Class lists are tuples in a fixed order, so that an index into one is a class id wherever an id is needed.
"""

CATEGORIES = (
    "circle", "square", "triangle", "star", "heart", "cross",
    "ring", "diamond", "moon", "arrow", "house", "tree",
)  # fmt: skip

PLURALS = {category: category + "s" for category in CATEGORIES} | {"cross": "crosses"}

# One RGB value per colour name, far apart from each other and from the grey backgrounds.
COLOUR_VALUES: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 38),
    "orange": (255, 136, 0),
    "yellow": (255, 228, 30),
    "green": (24, 150, 60),
    "blue": (30, 74, 220),
    "purple": (128, 40, 170),
    "pink": (255, 132, 200),
    "black": (22, 22, 26),
}
COLOURS = tuple(COLOUR_VALUES)

# Width of an object as a fraction of the image: 17 and 28 pixels of 96.
SIZE_FRACTIONS = {"small": 17 / 96, "large": 28 / 96}
SIZES = tuple(SIZE_FRACTIONS)

TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("plain", "gradient", "checker", "noise")

DIGITS = tuple("0123456789")
WORDS = ("BED", "BUS", "CAT", "CUP", "DOG", "FOX", "HAT", "KEY", "PIG", "SUN")
LABELS = DIGITS + WORDS

# Names of the cells of a 3 x 3 grid over the image, row by row.
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)

# Categories come in affine pairs; PARTNERS maps each to the other.
PAIRS = (
    ("star", "moon"), ("house", "tree"), ("circle", "ring"),
    ("heart", "arrow"), ("square", "triangle"), ("diamond", "cross"),
)  # fmt: skip
PARTNERS = dict(PAIRS) | {b: a for a, b in PAIRS}

# Relative weight of a category when it is drawn freely; the popular ones come three times as often as the rest.
POPULAR = ("star", "house", "circle")
POPULARITY = {category: 3.0 if category in POPULAR else 1.0 for category in CATEGORIES}

# Each object after the first is, in this order: the missing partner of a category already there (if there is one),
# one more of a category already there, or a free draw by POPULARITY.
PARTNER_PROBABILITY = 0.50
REPEAT_PROBABILITY = 0.20

MIN_OBJECTS, MAX_OBJECTS = 2, 5
LARGE_PROBABILITY = 0.5
LABEL_PROBABILITY = 0.6  # of a large object; small ones carry no label
