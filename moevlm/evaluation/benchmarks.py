"""Benchmarks: which records, asked how, scored how; found in a folder of LLaVA records."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moevlm.data.image_folders import find_image_folder
from moevlm.data.records import RecordFile, load_json_records
from moevlm.evaluation.answers import SCORERS, Extractor
from moevlm.world.ground_truth import mentioned_categories
from moevlm.world.vocabulary import CATEGORIES

SUFFIX = "_test.json"
POPE_PREFIX = "pope_"
MAX_NEW_TOKENS = {"vqa": 16, "pope": 8, "chair": 192, "overlap": 192}
"""Longest answer by scorer, where no other is given."""


@dataclass(frozen=True)
class Benchmark:
    """Records and how their answers are scored.

    Attributes:
        name: names the answer file and the scores.
        files: LLaVA JSON files by split; the split goes into every row (POPE's negatives).
        image_folder: what the records' image paths are relative to.
        scorer: a key of `SCORERS`.
        max_new_tokens: longest answer.
        extract: objects named in a text; for `chair`.
    """

    name: str
    files: Mapping[str, Path]
    image_folder: Path
    scorer: str
    max_new_tokens: int
    extract: Extractor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise ValueError(
                f"scorer of benchmark {self.name} must be one of {', '.join(SCORERS)}, got {self.scorer!r}"
            )
        if self.scorer == "chair" and self.extract is None:
            raise ValueError(f"benchmark {self.name} needs `extract`, the objects named in a text, for scorer chair")

    def select(self, *, limit: int | None = None) -> list[tuple[str, RecordFile, int]]:
        """(split, file, number) of all records, or of `limit` of them, the same ones every time.

        A limit is shared evenly by splits, and in each in proportion by kinds, and by POPE's yes and no.

        Raises:
            ValueError: limit is less than 1.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, or null for all records, got {limit}; set limit")
        chosen: list[tuple[str, RecordFile, int]] = []
        for index, (split, path) in enumerate(self.files.items()):
            file = RecordFile(path, self.image_folder, verify=False)  # the processor decodes every image anyway
            share = len(file) if limit is None else min((limit + index) // len(self.files), len(file))
            numbers = self._spread(file, random.Random(f"{self.name}/{split}"))[:share]
            chosen.extend((split, file, number) for number in sorted(numbers))
        return chosen

    def _spread(self, file: RecordFile, rng: random.Random) -> list[int]:
        """All numbers of a file in a random order whose every beginning has kinds (and yes and no) in proportion."""
        strata: dict[str, list[int]] = {}
        for number, values in enumerate(file.values):
            turns = values.get("conversations") if isinstance(values, dict) else None
            name = [values.get("kind")] if isinstance(values, dict) else []
            strata.setdefault(str([*name, turns[-1] if turns and self.scorer == "pope" else None]), []).append(number)
        places = []
        for members in strata.values():
            rng.shuffle(members)
            places += [((rank + rng.random()) / len(members), number) for rank, number in enumerate(members)]
        return [number for _, number in sorted(places)]


def find_benchmarks(
    folder: str | Path,
    names: Sequence[str] | None = None,
    *,
    image_folder: str | Path | None = None,
    max_new_tokens: Mapping[str, int] | None = None,
    extract: Extractor | None = None,
) -> list[Benchmark]:
    """The benchmarks of a data folder: every ``<name>_test.json`` in it.

    ``pope_<split>_test.json`` files are one benchmark, ``pope``. Files whose records list their ``objects`` are scored
    by chair, files of ``kind`` caption or description without them by word overlap, and everything else as vqa.

    Args:
        folder: record files, as the miniature world and the converters write them.
        names: which ones; None or ["all"] means all.
        image_folder: None means ``images/`` in the folder or the folder itself, wherever the first image is.
        max_new_tokens: by scorer, changes to `MAX_NEW_TOKENS`.
        extract: objects named in a text; None means the world's own where all objects are categories of the world, and
            else whole-word search for the names that occur among the records' objects.

    Raises:
        ValueError: nothing found, an unknown name, or a record file that is no list of objects.
    """
    files: dict[str, dict[str, Path]] = {}
    for file in sorted(Path(folder).glob(f"*{SUFFIX}")):
        name = file.name.removesuffix(SUFFIX)
        is_pope = name.startswith(POPE_PREFIX)
        files.setdefault("pope" if is_pope else name, {})[name.removeprefix(POPE_PREFIX) if is_pope else "test"] = file
    if not files:
        raise ValueError(
            f"no benchmark in {folder}: it holds no file *{SUFFIX}; set data_folder to a folder of records"
        )
    wanted = list(files) if names is None or list(names) == ["all"] else list(names)
    unknown = [name for name in wanted if name not in files]
    if unknown:
        raise ValueError(f"no benchmark {', '.join(unknown)} in {folder}; known: {', '.join(files)}; set benchmarks")
    lengths = MAX_NEW_TOKENS | dict(max_new_tokens or {})
    return [_make(name, files[name], Path(folder), image_folder, lengths, extract) for name in wanted]


def vocabulary_extractor(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Objects named in a text, by whole words: each name of the vocabulary once, plain or with s or es appended."""
    longest_first = sorted(set(names), key=lambda name: (-len(name), name))
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")(?:s|es)?\b", re.IGNORECASE)
    known = {name.lower(): name for name in longest_first}

    def extract(text: str) -> list[str]:
        return sorted({known[found.lower()] for found in pattern.findall(text)})

    return extract


def _make(
    name: str, files: Mapping[str, Path], folder: Path, image_folder: str | Path | None, lengths: Mapping[str, int],
    extract: Extractor | None,
) -> Benchmark:  # fmt: skip
    records = [record for file in files.values() for record in load_json_records(file)]
    bad = next((record for record in records if not isinstance(record, dict)), None)
    if bad is not None:
        raise ValueError(
            f"benchmark {name} must hold JSON objects, got {bad!r}; mend {', '.join(map(str, files.values()))}"
        )
    scorer = _choose_scorer(name, records)
    if scorer == "chair" and extract is None:
        objects = {item for record in records for item in record["objects"]}
        extract = mentioned_categories if objects <= set(CATEGORIES) else vocabulary_extractor(sorted(objects))
    images = Path(image_folder) if image_folder is not None else find_image_folder(folder, records)
    return Benchmark(name, dict(files), images, scorer, lengths[scorer], extract)


def _choose_scorer(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    if name == "pope":
        return "pope"
    if records and all("objects" in record for record in records):
        return "chair"
    kinds = {record.get("kind") for record in records}
    return "overlap" if kinds and kinds <= {"caption", "description"} else "vqa"
