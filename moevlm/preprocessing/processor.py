"""Records to encoded samples: tokenizer, chat template and image transform in one object, saved with a model."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moevlm.batch import (
    DEFAULT_VIEW,
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    NO_PAIR,
    EncodedSample,
    Record,
    Tiling,
    Turn,
)
from moevlm.ops.tiling import num_tiled_tokens
from moevlm.preprocessing.alignment import align_samples
from moevlm.preprocessing.chat_templates import ChatTemplate
from moevlm.preprocessing.images import ImageSource, ImageTransform, encoder_settings, upright_size
from moevlm.preprocessing.rejection import RejectedSample
from moevlm.preprocessing.templates import IMAGE_TAG
from moevlm.preprocessing.text_side import EncodedTurns, TextSide, View

PROCESSOR_FILE = "processor.json"
OVERLONG = ("reject", "drop_rounds")


class Processor:
    """What turns a raw sample into tokens and pixels.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: name of a `ChatTemplate`.
        image_transform: makes the default view of every image.
        max_length: longest sequence, in tokens, every image counted as `num_visual_tokens`.
        num_visual_tokens: what a picture takes in the decoder's row; the model's `num_visual_tokens`. A tiled image
            takes more (`moevlm.ops.tiling.num_tiled_tokens`).
        overlong: what happens to a longer one: `reject`, or `drop_rounds` (whole last rounds go until it fits).
        extra_views: transforms of further views by name, for a teacher with another vision encoder.
        teacher: the processor of a teacher with another tokenizer; every sample then carries that one's, too.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str,
        image_transform: ImageTransform,
        *,
        max_length: int = 2048,
        num_visual_tokens: int = 1,
        overlong: str = "reject",
        extra_views: Mapping[str, ImageTransform] | None = None,
        teacher: Processor | None = None,
    ) -> None:
        if overlong not in OVERLONG:
            raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}; set processor.overlong")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}; set processor.max_length")
        self.tokenizer = tokenizer
        self.template = ChatTemplate(chat_template, tokenizer)
        self.image_transform = image_transform
        self.max_length, self.num_visual_tokens, self.overlong = max_length, num_visual_tokens, overlong
        self.extra_views, self.teacher = dict(extra_views or {}), teacher
        if image_transform.is_tiled and math.isqrt(num_visual_tokens) ** 2 != num_visual_tokens:
            raise ValueError(
                f"a tiled image needs a square number of visual tokens a tile, got {num_visual_tokens}; set "
                "processor.num_visual_tokens to the model's (without a CLS token), or another processor.image.mode"
            )

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids at which generation ends an answer."""
        return self.template.stop_token_ids

    def with_view(self, name: str, transform: ImageTransform) -> Processor:
        """The same processor, which makes one more view of every image."""
        return self._copy(extra_views={**self.extra_views, name: transform})

    def with_teacher(self, teacher: Processor) -> Processor:
        """The same processor, which also encodes every conversation as a teacher of another tokenizer reads it."""
        return self._copy(teacher=teacher)

    def encode(self, record: Record, *, source: int = 0, pair_id: int = NO_PAIR) -> list[EncodedSample]:
        """Encode a conversation, or with a `pair_id` the chosen and the rejected conversation of a preference pair.

        Without a `pair_id` a preference record gives its chosen conversation alone (fine-tuning on preferred answers).

        Raises:
            RejectedSample: too_long, image_tag_mismatch, not_a_pair, or a reason of the template or an image.
        """
        return self.encode_text(record, source=source, pair_id=pair_id).with_images()

    def encode_text(self, record: Record, *, source: int = 0, pair_id: int = NO_PAIR) -> TextSide:
        """The cheap half of `encode`: the tokens of the record, whose images are still files.

        A micro-batch is faster when all its texts come before its images, which empty the caches of the processor.

        Raises:
            RejectedSample: as `encode`, for all but the images.
        """
        if pair_id != NO_PAIR and record.rejected_turns is None:
            raise RejectedSample("not_a_pair", "a preference stage needs records with chosen and rejected turns")
        sides = [record.turns]
        if pair_id != NO_PAIR and record.rejected_turns is not None:
            sides.append(record.rejected_turns)
        counts = self._visual_tokens(record.images)
        encoded = [self._encode_turns(turns, counts, shorten=pair_id == NO_PAIR) for turns in sides]
        return TextSide(self, record, encoded, source, pair_id)

    def encode_prompt(
        self, turns: Sequence[Turn], images: Sequence[ImageSource] = (), *, key: str = ""
    ) -> EncodedSample:
        """A prompt for generation: ends where the answer starts, exactly as in training; no labels."""
        ids_S, labels_S, segments_S = self.template.encode(turns, add_generation_prompt=True)
        views = self.views_of(images)
        self._length(ids_S, self._visual_tokens(images))
        return EncodedSample(
            key,
            ids_S,
            torch.full_like(labels_S, IGNORE_INDEX),
            segments_S,
            {name: view.pixels for name, view in views.items()},
            tilings={name: view.tilings for name, view in views.items() if view.tilings is not None},
            scales={name: view.scale for name, view in views.items()},
        )

    def count_tokens(self, record: Record) -> tuple[int, int]:
        """Text tokens (images not counted) and images of a record; the longer side of a pair. No image is decoded.

        What a tiled image takes beyond `num_visual_tokens` counts as text.
        """
        sides = [record.turns] if record.rejected_turns is None else [record.turns, record.rejected_turns]
        num_images = len(record.images)
        more = sum(self._visual_tokens(record.images)) - num_images * self.num_visual_tokens
        return max(len(self.template.encode(turns)[0]) for turns in sides) - num_images + more, num_images

    def token_hash(self) -> str:
        """Names what `count_tokens` depends on: the tokenizer, the template, and how images are tiled, if they are."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        described = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        for state in ("truncation", "padding"):  # of the last call, not of the vocabulary
            described.pop(state, None) if backend is not None else None
        own = self.tokenizer.chat_template if self.template.name == "backbone" else None
        tiles = [self.image_transform.to_dict(), self.num_visual_tokens] if self.image_transform.is_tiled else []
        text = json.dumps([described, self.template.name, own, *tiles], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer files and ``processor.json``.

        A layout of ours becomes the saved tokenizer's chat template, so that other programs render the same prompt.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(path))
        if self.template.jinja is not None:
            (path / "chat_template.jinja").write_text(self.template.jinja)
        (path / PROCESSOR_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tokenizer and the extra views, which belong to a run and not to a model."""
        return {
            "chat_template": self.template.name,
            "image": self.image_transform.to_dict(),
            "max_length": self.max_length,
            "num_visual_tokens": self.num_visual_tokens,
            "overlong": self.overlong,
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Processor:
        """Read what `save_pretrained` wrote."""
        return build_processor(str(folder))

    def _copy(self, **changes: Any) -> Processor:
        options: dict[str, Any] = {
            "max_length": self.max_length,
            "num_visual_tokens": self.num_visual_tokens,
            "overlong": self.overlong,
            "extra_views": self.extra_views,
            "teacher": self.teacher,
        }
        return Processor(self.tokenizer, self.template.name, self.image_transform, **{**options, **changes})

    def with_teachers_side(
        self, samples: list[EncodedSample], record: Record, source: int, pair_id: int
    ) -> list[EncodedSample]:
        """The samples with what a teacher of another tokenizer reads; as they are without one."""
        if self.teacher is None:
            return samples
        others = self.teacher.encode(record, source=source, pair_id=pair_id)
        tokenizers = self.tokenizer, self.teacher.tokenizer
        try:
            spans = [align_samples(own, other, *tokenizers) for own, other in zip(samples, others)]
        except ValueError as error:
            raise RejectedSample("unaligned", str(error)) from error
        return [replace(own, teacher=other, spans=one) for own, other, one in zip(samples, others, spans)]

    def views_of(self, images: Sequence[ImageSource]) -> dict[str, View]:
        """The images as every transform makes them, by the name of the view."""
        views = {DEFAULT_VIEW: self.image_transform, **self.extra_views}
        return {name: View(*transform.stack(images), transform.scale) for name, transform in views.items()}

    def tilings_of(self, images: Sequence[ImageSource]) -> tuple[Tiling, ...]:
        """How a tiled transform cuts these images; sizes are read from the files' headers."""
        return tuple(self.image_transform.tiling(upright_size(image)) for image in images)

    def _visual_tokens(self, images: Sequence[ImageSource]) -> list[int]:
        """What each image takes in the decoder's row; sizes are read from the files' headers."""
        if not self.image_transform.is_tiled:
            return [self.num_visual_tokens] * len(images)
        side = math.isqrt(self.num_visual_tokens)
        return [num_tiled_tokens(tiling, side=side) for tiling in self.tilings_of(images)]

    def _encode_turns(self, turns: Sequence[Turn], visual_tokens: Sequence[int], *, shorten: bool) -> EncodedTurns:
        """Tokens of the longest run of first rounds that fits, and how many of the images it shows."""
        ends = [len(turns)]  # of the runs that may be taken, longest first
        while shorten and self.overlong == "drop_rounds":
            end = ends[-1] - (1 if turns[ends[-1] - 1].role == "user" else 2)
            if not any(turn.role == "assistant" for turn in turns[: max(end, 0)]):
                break
            ends.append(end)
        tried: dict[int, tuple[EncodedTurns, int]] = {}

        def fits(end: int) -> bool:
            ids_S, labels_S, segments_S = self.template.encode(turns[:end])
            tags = sum(turn.text.count(IMAGE_TAG) for turn in turns[:end])
            shown = len(visual_tokens) if end == len(turns) else tags
            length = self._length(ids_S, visual_tokens[:shown])
            tried[end] = (ids_S, labels_S, segments_S, shown), length
            return length <= self.max_length

        found = 0 if fits(ends[0]) else bisect.bisect_left(ends, True, lo=1, key=fits)  # a long one has many rounds
        if found == len(ends):
            raise RejectedSample("too_long", f"{tried[ends[-1]][1]} tokens, processor.max_length is {self.max_length}")
        return tried[ends[found]][0]

    def _length(self, ids_S: torch.Tensor, visual_tokens: Sequence[int]) -> int:
        """Tokens in the decoder's row, once every image placeholder has an image."""
        tags = int((ids_S.numpy() == IMAGE_TOKEN_ID).sum())
        if tags != len(visual_tokens):
            raise RejectedSample("image_tag_mismatch", f"{tags} <image> tags, {len(visual_tokens)} images")
        return len(ids_S) + sum(visual_tokens) - tags


def build_processor(
    tokenizer: str,
    chat_template: str | None = None,
    image: Mapping[str, Any] | None = None,
    *,
    max_length: int | None = None,
    num_visual_tokens: int | None = None,
    overlong: str | None = None,
) -> Processor:
    """A processor from a tokenizer folder or hub id.

    What is not given is read from ``processor.json`` beside the tokenizer, as `Processor.save_pretrained` leaves it in
    every model folder. `image` holds the arguments of `ImageTransform`; with ``encoder``, the name of a timm model,
    those that are not given are that model's own.
    """
    from transformers import AutoTokenizer

    saved_file = Path(tokenizer) / PROCESSOR_FILE
    saved = json.loads(saved_file.read_text()) if saved_file.is_file() else {}
    given = {
        "chat_template": chat_template,
        "image": dict(image) if image is not None else None,
        "max_length": max_length,
        "num_visual_tokens": num_visual_tokens,
        "overlong": overlong,
    }
    options = {**saved, **{name: value for name, value in given.items() if value is not None}}
    for name in ("chat_template", "image"):
        if name not in options:
            raise ValueError(f"{tokenizer} has no {PROCESSOR_FILE}, so processor.{name} must be set")
    image_settings = options.pop("image")
    encoder = image_settings.pop("encoder", None)
    transform = ImageTransform(**{**({} if encoder is None else encoder_settings(encoder)), **image_settings})
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no tokenizer at {tokenizer!r}: {reason}; set processor.tokenizer to a folder or hub id"
        ) from None
    return Processor(loaded, options.pop("chat_template"), transform, **options)
