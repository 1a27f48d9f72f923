"""Where the images of a folder of record files are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def find_image_folder(folder: str | Path, records: Iterable[Any]) -> Path:
    """What the records' image paths are relative to: ``images/`` below the folder, or the folder itself.

    Decided by where the first image named is; the folder itself when there is none.
    """
    folder = Path(folder)
    for record in records:
        image = record.get("image") if isinstance(record, dict) else None
        first = image[0] if isinstance(image, list) and image else image
        if isinstance(first, str):
            return folder / "images" if (folder / "images" / first).is_file() else folder
    return folder
