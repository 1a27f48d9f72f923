"""The converter of the Tux Paint stamps, on a made-up package of the same layout; nothing is downloaded."""

import colorsys
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from moevlm.data.converters import stamps, stamps_labels, stamps_pictures, stamps_questions

SUBJECTS = {
    "animals/birds": ["crow", "duck", "gander", "heron", "lark"],
    "animals/mammals": ["bison", "ferret", "goat", "horse", "lion"],
    "food/fruit": ["apple", "banana", "cherry", "grape", "lemon"],
    "food/vegetables": ["carrot", "garlic", "onion", "potato", "yam"],
    "vehicles/auto": ["bus", "jeep", "sedan", "taxi", "van"],
    "symbols/alphabets/english/filled/lowercase": ["a_filled", "b_filled"],
    "symbols/alphabets/english/outlined/lowercase": ["a_outline", "b_outline"],
    "seasonal": ["confetti"],
}


def draw(file: Path, number: int, *, width: int = 30, height: int = 20) -> None:
    """A cut-out that looks like no other number's: a bar code of its bits in its own hue."""
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    red, green, blue = (int(255 * part) for part in colorsys.hsv_to_rgb(number / 40, 0.9, 0.9))
    pen.rectangle((2, 2, width - 3, height - 3), fill=(red, green, blue, 255))
    for bit in range(6):
        if number >> bit & 1:
            pen.rectangle((4 + 4 * bit, 4, 6 + 4 * bit, height - 5), fill=(0, 0, 0, 255))
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def make_package(folder: Path) -> Path:
    root = folder / stamps.STAMPS_FOLDER
    number = 0
    for subject, names in SUBJECTS.items():
        for name in names:
            number += 1
            draw(root / subject / f"{name}.png", number, height=20 + number % 3 * 10)
            text = f"The letter {name[0]}." if "_" in name else f"A {name}."
            (root / subject / f"{name}.txt").write_text(f"{text}\nde.utf8=Etwas.\n", encoding="utf-8")
    with Image.open(root / "vehicles/auto/bus.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "vehicles/auto/bus_mirror.png")
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make_package(tmp_path / "package")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    stamps.convert(make_package(folder / "package"), folder / "out", seed=0, validation_fraction=0.2)
    return folder / "out"


def load(folder: Path, pattern: str = "*_*.json") -> dict[str, list[dict]]:
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(pattern))}


def test_every_file_of_the_three_splits_is_written(converted: Path) -> None:
    expected = {
        f"{name}_{split}.json"
        for name in ("captions", "instructions", "preferences")
        for split in ("train", "validation")
    }
    expected |= {
        f"{name}_test.json" for name in ("vqa", "descriptions", "pope_random", "pope_popular", "pope_adversarial")
    }
    assert set(load(converted)) == expected


def test_ids_are_unique_in_a_file_and_hold_no_dots(converted: Path) -> None:
    for records in load(converted).values():
        ids = [record["id"] for record in records]
        assert len(set(ids)) == len(ids)
        assert not any("." in name for name in ids)


def test_every_image_of_a_record_is_a_small_rgb_picture(converted: Path) -> None:
    for records in load(converted).values():
        for record in records:
            with Image.open(converted / record["image"]) as image:
                assert image.mode == "RGB"
                assert max(image.size) <= 256


def test_no_picture_is_in_two_splits(converted: Path) -> None:
    splits = defaultdict(set)
    for name, records in load(converted).items():
        for record in records:
            splits[record["image"]].add(name.removesuffix(".json").rsplit("_", 1)[1])
    assert all(len(found) == 1 for found in splits.values())


def test_only_the_first_question_of_a_conversation_carries_the_image(converted: Path) -> None:
    for record in load(converted)["instructions_train.json"]:
        marks = [turn["value"].count("<image>") for turn in record["conversations"]]
        assert marks == [1] + [0] * (len(marks) - 1)


def test_evaluation_records_name_their_benchmark(converted: Path) -> None:
    for name, records in load(converted, "*_test.json").items():
        assert {record["benchmark"] for record in records} == {"stamps_" + name.removesuffix("_test.json")}


def test_names_of_held_out_subjects_are_not_asked_for(converted: Path) -> None:
    files = load(converted)
    assert "name" in {record["kind"] for record in files["instructions_train.json"]}
    assert "name" not in {record["kind"] for record in files["vqa_test.json"] + files["instructions_validation.json"]}


def test_the_text_of_an_existence_question_tells_nothing_about_its_answer(converted: Path) -> None:
    for name in ("instructions_train.json", "vqa_test.json"):
        answers: dict[str, Counter] = defaultdict(Counter)
        for record in load(converted)[name]:
            if record["kind"] == "existence":
                answers[record["conversations"][0]["value"]][stamps_questions.gold(record)] += 1
        assert answers
        assert all(counts["yes"] == counts["no"] for counts in answers.values())


def test_rejected_descriptions_belong_to_another_subject_of_the_same_category(converted: Path) -> None:
    category = {f"A {name}.": folder.split("/")[0] for folder, names in SUBJECTS.items() for name in names}
    subject = {f"A {name}.": folder for folder, names in SUBJECTS.items() for name in names}
    pairs = [
        (record["chosen"][1]["value"], record["rejected"][1]["value"])
        for record in load(converted)["preferences_train.json"]
        if record["kind"] == "description" and "symbols" not in record["image"]
    ]
    assert pairs
    assert all(category[one] == category[other] and subject[one] != subject[other] for one, other in pairs)


def test_the_same_seed_writes_the_same_files(package: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        stamps.convert(package, tmp_path / name, seed=3)
    contents = [
        {f.relative_to(tmp_path / name): f.read_bytes() for f in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    ]
    assert contents[0] == contents[1]


def test_another_seed_makes_another_split(package: Path, tmp_path: Path) -> None:
    images = []
    for seed in (0, 1):
        stamps.convert(package, tmp_path / str(seed), seed=seed)
        images.append({record["image"] for record in load(tmp_path / str(seed))["descriptions_test.json"]})
    assert images[0] != images[1]


@pytest.mark.parametrize("seed", range(5))
def test_variants_of_a_subject_share_a_split(package: Path, seed: int) -> None:
    found, _ = stamps.read_stamps(stamps.find_stamps(package), image_size=64)
    stamps_pictures.assign_splits(found, seed=seed, validation_fraction=0.2, test_fraction=0.3)
    splits = {stamp.path.rpartition("/")[2]: stamp.split for stamp in found}
    assert splits["bus.png"] == splits["bus_mirror.png"]
    assert splits["a_filled.png"] == splits["a_outline.png"]


def test_pictures_that_look_the_same_share_a_group_whatever_they_are_called(package: Path) -> None:
    root = stamps.find_stamps(package)
    with Image.open(root / "animals/birds/crow.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "seasonal/raven.png")
    (root / "seasonal/raven.txt").write_text("Nevermore.\n", encoding="utf-8")
    found, _ = stamps.read_stamps(root, image_size=64)
    groups = dict(zip((stamp.path for stamp in found), stamps_pictures.group_by_subject(found)))
    assert groups["seasonal/raven.png"] == groups["animals/birds/crow.png"]
    assert groups["animals/birds/duck.png"] != groups["animals/birds/crow.png"]


def test_a_mirrored_file_takes_the_description_of_its_stamp(package: Path) -> None:
    stamp = stamps_pictures.read_stamp(stamps.find_stamps(package), "vehicles/auto/bus_mirror.png", image_size=64)
    assert stamp.description == "A bus."


def test_unusable_pictures_are_named_with_their_reason(package: Path, tmp_path: Path) -> None:
    root = stamps.find_stamps(package)
    (root / "animals/broken.png").write_bytes(b"no picture")
    (root / "animals/broken.txt").write_text("A broken one.\n", encoding="utf-8")
    draw(root / "animals/silent.png", 39)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(root / "animals/empty.png")
    summary = stamps.convert(package, tmp_path / "out")
    assert list(summary.rejected) == ["animals/broken.png", "animals/empty.png", "animals/silent.png"]
    assert [reason.split(":")[0] for reason in summary.rejected.values()] == [
        "unreadable picture",
        "empty picture",
        "no description",
    ]
    assert json.loads((tmp_path / "out/summary.json").read_text())["rejected"] == summary.rejected


def test_too_many_unusable_pictures_are_an_error(package: Path, tmp_path: Path) -> None:
    for text in stamps.find_stamps(package).glob("animals/birds/*.txt"):
        text.unlink()
    with pytest.raises(ValueError, match=r"5 of 31 pictures .* unusable, max_rejected_fraction=0.1"):
        stamps.convert(package, tmp_path / "out")


def test_a_folder_without_stamps_is_an_error_that_says_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stamps\.fetch"):
        stamps.convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("settings", [{"image_size": 4}, {"test_fraction": 0.95}, {"validation_fraction": 0.0}])
def test_settings_out_of_range_are_refused_by_name(package: Path, tmp_path: Path, settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        stamps.convert(package, tmp_path / "out", **settings)


def test_transparent_parts_become_the_plain_background() -> None:
    cut_out = Image.new("RGBA", (20, 10), (255, 0, 0, 255))
    image = stamps_pictures.on_background(cut_out, image_size=64)
    assert image.width == image.height
    assert image.getpixel((0, 0)) == stamps_pictures.BACKGROUND
    assert image.getpixel((image.width // 2, image.height // 2)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((220, 20, 30), "red"),
        ((250, 140, 10), "orange"),
        ((250, 230, 30), "yellow"),
        ((30, 150, 50), "green"),
        ((30, 70, 220), "blue"),
        ((130, 40, 180), "purple"),
        ((250, 130, 200), "pink"),
        ((110, 70, 40), "brown"),
        ((10, 10, 10), "black"),
        ((245, 245, 245), "white"),
        ((130, 130, 130), "grey"),
        ((255, 250, 200), stamps_pictures.UNCLEAR),
    ],
)
def test_plain_colours_get_their_everyday_names(rgb: tuple[int, int, int], name: str) -> None:
    assert stamps_pictures.colour_name(*rgb) == name


def test_a_picture_of_two_equal_colours_has_no_main_colour() -> None:
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 255))
    assert stamps_pictures.main_colour(image) == "red"
    image.paste((0, 0, 255, 255), (0, 0, 10, 20))
    assert stamps_pictures.main_colour(image) is None


@pytest.mark.parametrize(
    ("size", "name"), [((40, 20), "wide"), ((20, 40), "tall"), ((20, 21), "square"), ((24, 20), None)]
)
def test_proportion_is_withheld_near_its_borders(size: tuple[int, int], name: str | None) -> None:
    assert stamps_pictures.proportion(Image.new("RGBA", size)) == name


def test_folders_that_say_less_than_they_seem_give_no_category() -> None:
    assert stamps_labels.category_of("animals/mammals/lion.png") == "animal"
    assert stamps_labels.category_of("animals/mammals/bears/toys/edward_bear.png") is None
    assert stamps_labels.category_of("vehicles/emergency/sedan_police_mirror.png") is None
    assert stamps_labels.group_of("animals/insects/cartoon/spider_fly.png") is None


@pytest.mark.parametrize(
    ("description", "name"),
    [
        ("An electric guitar.", "electric guitar"),
        ("A pair of pliers.", "pliers"),
        ("A peacock (a male peafowl).", "peacock"),
        ("Eat your broccoli!", None),
        ("The tender carries water and coal for the engine.", None),
    ],
)
def test_only_short_noun_phrases_are_names(description: str, name: str | None) -> None:
    assert stamps_labels.name_of(description) == name


def test_every_category_has_a_phrase_and_its_look_alikes() -> None:
    categories = {category for category in stamps_labels.CATEGORY_BY_FOLDER.values() if category}
    assert categories == set(stamps_labels.PHRASES) == set(stamps_labels.MAY_ALSO_SHOW)


def test_balancing_bounds_the_majority_answer() -> None:
    answers = ["a"] * 40 + ["b"] * 10 + ["c"] * 5
    kept = Counter(stamps_questions.balanced(answers, str, max_excess=0.1))
    assert kept["a"] / kept.total() <= 1 / 3 + 0.1
    assert kept["b"] == 10
    assert kept["c"] == 5


def fake_command(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\nPATH={os.environ['PATH']}\n{script}\n")
    (folder / name).chmod(0o755)


def test_fetch_unpacks_what_the_package_manager_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(tmp_path / "bin", "apt-get", 'test "$1" = download && touch "$2_1.0_all.deb"')
    fake_command(tmp_path / "bin", "dpkg-deb", f'test -f "$2" && mkdir -p "$3/{stamps.STAMPS_FOLDER}"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folder = stamps.fetch(tmp_path / "cache")
    assert stamps.find_stamps(folder).is_dir()
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [stamps.PACKAGE]
    monkeypatch.setenv("PATH", "")
    assert stamps.fetch(tmp_path / "cache") == folder  # nothing to do, so no command is needed


def test_fetch_without_the_package_manager_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"apt-get and dpkg-deb not found: .*dpkg-deb -x FILE.deb FOLDER"):
        stamps.fetch(tmp_path / "cache")


def test_a_failed_download_leaves_nothing_and_quotes_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_command(tmp_path / "bin", "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    fake_command(tmp_path / "bin", "dpkg-deb", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ValueError, match=r"failed with 100 \(E: Unable to locate package\); run `apt-get update`"):
        stamps.fetch(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
