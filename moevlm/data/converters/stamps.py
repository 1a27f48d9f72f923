"""The stamps of Tux Paint as LLaVA records: a real collection of pictures that an ordinary package ships.

Debian's ``tuxpaint-stamps-default`` (GPL-2; also in Ubuntu) holds close to 800 raster stamps, nearly half of them
cut-out photographs and the rest drawings, letters and signs, each with an English description and filed by subject.
Nothing of it is in this repository. ``fetch`` gets the package by its ordinary commands, ``convert`` writes records and
images in the ordinary LLaVA form:

    captions_train.json          captions_validation.json       descriptions_test.json
    instructions_train.json      instructions_validation.json   vqa_test.json
    preferences_train.json       preferences_validation.json    pope_{random,popular,adversarial}_test.json
    images/                      summary.json

Pictures of one subject (mirrored, recoloured, photographed and drawn) share a split; see ``stamps_pictures``.
"""

import dataclasses
import gzip
import json
import logging
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moevlm.data.converters import stamps_questions as questions
from moevlm.data.converters.stamps_pictures import SPLITS, Stamp, assign_splits, read_stamp
from moevlm.data.converters.stamps_questions import Record

PACKAGE = "tuxpaint-stamps-default"
LICENCE = "GPL-2 (2002-2022 Bill Kendrick and the Tux Paint contributors)"
STAMPS_FOLDER = Path("usr/share/tuxpaint/stamps")
BY_HAND = f"unpack Debian's {PACKAGE} on a machine that has them (dpkg-deb -x FILE.deb FOLDER) and give that folder"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StampsSummary:
    """What a conversion found and wrote; also in summary.json, which is written last."""

    package: str
    version: str
    licence: str
    seed: int
    num_pictures: dict[str, int]  # by split
    num_subjects: dict[str, int]  # groups that were kept together, by split
    num_pictures_by_category: dict[str, dict[str, int]]  # split -> category; "none" where withheld
    num_records: dict[str, dict[str, int]]  # file -> kind
    majority_fraction: dict[str, dict[str, float]]  # test file -> kind -> share of the most frequent answer
    blind_fraction: dict[str, dict[str, float]]  # the same when the most frequent answer of each question text is given
    rejected: dict[str, str]  # picture -> reason
    num_vector_pictures_ignored: int  # SVG: Pillow does not draw them


def fetch(folder: Path) -> Path:
    """Download and unpack the package under ``folder``; no root needed. Done already: nothing is downloaded.

    The same by hand: ``apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb package``.

    Returns:
        The folder that ``convert`` takes.

    Raises:
        ValueError: a command is missing or fails; the message says what to do.
    """
    target = Path(folder) / PACKAGE
    if (target / STAMPS_FOLDER).is_dir():
        return target
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not found: fetching {PACKAGE} needs Debian or Ubuntu; or {BY_HAND}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, so that the rename publishes a whole package or none
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        temporary = Path(name)
        hint = f"run `apt-get update` as root and try again; or {BY_HAND}"
        _run(["apt-get", "download", PACKAGE], cwd=temporary, hint=hint)
        archive = next(temporary.glob(f"{PACKAGE}_*.deb"), None)
        if archive is None:
            raise ValueError(f"apt-get download {PACKAGE} left no .deb file; {hint}")
        _run(["dpkg-deb", "-x", archive.name, "package"], cwd=temporary, hint="check the free disk space (500 MB)")
        find_stamps(temporary / "package")
        (temporary / "package").rename(target)
    return target


def _run(command: list[str], *, cwd: Path, hint: str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"`{' '.join(command)}` failed with {done.returncode} ({lines[-1]}); {hint}")


def find_stamps(package_folder: Path) -> Path:
    """The folder of categories inside an unpacked package.

    Raises:
        ValueError: there is none.
    """
    folder = Path(package_folder) / STAMPS_FOLDER
    if not folder.is_dir():
        raise ValueError(f"{package_folder} holds no {STAMPS_FOLDER}; give the unpacked {PACKAGE}, see stamps.fetch")
    return folder


def package_version(package_folder: Path) -> str:
    """Version from Debian's changelog, "unknown" without one."""
    changelog = Path(package_folder) / "usr/share/doc" / PACKAGE / "changelog.Debian.gz"
    try:
        with gzip.open(changelog, "rt", encoding="utf-8") as file:
            match = re.match(r"\S+ \(([^)]+)\)", file.readline())
    except (OSError, EOFError, UnicodeDecodeError):
        return "unknown"
    return match[1] if match else "unknown"


def convert(
    package_folder: Path,
    output_folder: Path,
    *,
    seed: int = 0,
    image_size: int = 256,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.3,
    max_excess: float = 0.1,
    max_rejected_fraction: float = 0.1,
) -> StampsSummary:
    """Write the unpacked package as LLaVA records and RGB images; the same input and seed give the same files.

    Args:
        package_folder: what ``fetch`` returns.
        output_folder: made if missing; files of an earlier conversion are overwritten.
        seed: of the splits, phrasings and negatives.
        image_size: longest side of an image; smaller pictures are not enlarged.
        validation_fraction, test_fraction: expected shares of subjects, not exact ones.
        max_excess: in test, no answer of a kind holds more than 1 / num_answers + max_excess of its questions.
        max_rejected_fraction: a larger share of unusable pictures is an error.

    Raises:
        ValueError: no stamps, a setting out of range, or too many unusable pictures.
    """
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16, got {image_size}")
    if not (0 < validation_fraction < 1 and 0 < test_fraction < 1 and validation_fraction + test_fraction < 1):
        raise ValueError(
            "validation_fraction and test_fraction must be positive and leave pictures for training, "
            f"got {validation_fraction} and {test_fraction}"
        )
    root, output = find_stamps(package_folder), Path(output_folder)
    stamps, rejected = read_stamps(root, image_size=image_size)
    if len(rejected) > max_rejected_fraction * (len(stamps) + len(rejected)):
        raise ValueError(
            f"{len(rejected)} of {len(stamps) + len(rejected)} pictures of {root} are unusable, "
            f"max_rejected_fraction={max_rejected_fraction} allows fewer; first: {next(iter(rejected.items()))}"
        )
    if not stamps:
        raise ValueError(f"{root} holds no .png pictures; give the unpacked {PACKAGE}")
    assign_splits(stamps, seed=seed, validation_fraction=validation_fraction, test_fraction=test_fraction)
    files = build_records(stamps, seed=seed, max_excess=max_excess)
    summary = _summarise(stamps, files, rejected, root=root, version=package_version(package_folder), seed=seed)

    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").unlink(missing_ok=True)
    for stamp in stamps:
        file = output / questions.image_path(stamp)
        file.parent.mkdir(parents=True, exist_ok=True)
        stamp.image.save(file, quality=92, subsampling=0)
    for name, records in files.items():
        _write_json(output / name, records)
    _write_json(output / "summary.json", dataclasses.asdict(summary))
    return summary


def read_stamps(root: Path, *, image_size: int) -> tuple[list[Stamp], dict[str, str]]:
    """All usable stamps in the order of their paths, and the reason for every unusable one."""
    stamps: list[Stamp] = []
    rejected: dict[str, str] = {}
    for file in sorted(root.rglob("*.png")):
        path = file.relative_to(root).as_posix()
        try:
            stamps.append(read_stamp(root, path, image_size=image_size))
        except ValueError as error:
            rejected[path] = str(error)
            logger.warning("stamp %s left out: %s", path, error)
    return stamps, rejected


def build_records(stamps: list[Stamp], *, seed: int, max_excess: float) -> dict[str, list[Record]]:
    """The records of every file, by file name."""
    train, validation, test = ([stamp for stamp in stamps if stamp.split == split] for split in SPLITS)
    files = {
        "captions_train.json": questions.captions(train, seed=seed),
        "captions_validation.json": questions.captions(validation, seed=seed),
        "instructions_train.json": _instructions(train, questions.OPEN_KINDS, seed=seed),
        "instructions_validation.json": _instructions(validation, questions.HELD_OUT_KINDS, seed=seed),
        "preferences_train.json": questions.preferences(train, seed=seed),
        "preferences_validation.json": questions.preferences(validation, seed=seed),
    }
    benchmarks = {
        "vqa": questions.held_out_questions(test, seed=seed, max_excess=max_excess),
        "descriptions": questions.captions(test, seed=seed),
    }
    for negatives in questions.POPE_NEGATIVES:
        benchmarks[f"pope_{negatives}"] = questions.pope_questions(
            negatives, test, train, seed=seed, max_excess=max_excess
        )
    for name, records in benchmarks.items():
        files[f"{name}_test.json"] = [record | {"benchmark": f"stamps_{name}"} for record in records]
    for name, records in files.items():
        repeated = [key for key, count in Counter(record["id"] for record in records).items() if count > 1]
        assert not repeated, (name, repeated)
    return files


def _instructions(stamps: list[Stamp], kinds: tuple[str, ...], *, seed: int) -> list[Record]:
    return (
        questions.open_questions(stamps, kinds, seed=seed)
        + questions.existence_questions(stamps, stamps, seed=seed)
        + questions.conversations(stamps, seed=seed)
    )


def _summarise(
    stamps: list[Stamp],
    files: dict[str, list[Record]],
    rejected: dict[str, str],
    *,
    root: Path,
    version: str,
    seed: int,
) -> StampsSummary:
    by_split = {split: [stamp for stamp in stamps if stamp.split == split] for split in SPLITS}
    tests = [name for name in files if name.endswith("_test.json") and name != "descriptions_test.json"]
    return StampsSummary(
        package=PACKAGE,
        version=version,
        licence=LICENCE,
        seed=seed,
        num_pictures={split: len(members) for split, members in by_split.items()},
        num_subjects={split: len({stamp.group for stamp in members}) for split, members in by_split.items()},
        num_pictures_by_category={
            split: dict(sorted(Counter(stamp.category or "none" for stamp in members).items()))
            for split, members in by_split.items()
        },
        num_records={name: dict(Counter(record["kind"] for record in records)) for name, records in files.items()},
        majority_fraction={name: dict(_majority(files[name], by_question=False)) for name in tests},
        blind_fraction={name: dict(_majority(files[name], by_question=True)) for name in tests},
        rejected=rejected,
        num_vector_pictures_ignored=sum(1 for _ in root.rglob("*.svg")),
    )


def _majority(records: list[Record], *, by_question: bool) -> Iterator[tuple[str, float]]:
    """(kind, accuracy of the most frequent answer: one for the kind, or one for every question text of it)."""
    for kind in dict.fromkeys(record["kind"] for record in records):
        answers: dict[str, Counter[str]] = {}
        for record in records:
            if record["kind"] == kind:
                key = record["conversations"][0]["value"] if by_question else ""
                answers.setdefault(key, Counter())[questions.gold(record)] += 1
        right = sum(max(counts.values()) for counts in answers.values())
        yield kind, right / sum(counts.total() for counts in answers.values())


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
