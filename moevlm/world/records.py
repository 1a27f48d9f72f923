"""LLaVA records: conversations between human and gpt about an image, as plain JSON values."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moevlm.world.texts.questions import PHRASING_SPLITS

Record = dict[str, Any]
Turn = tuple[str, str]  # (what the human says, what gpt answers)

IMAGE_TOKEN = "<image>"


def conversation_record(
    name: str, turns: Sequence[Turn], *, kind: str, phrasing: str, image: str | None = None,
    scene_id: str | None = None, **extra: Any,
) -> Record:  # fmt: skip
    """A record of one or several turns; ``open`` says whether its last answer is more than yes or no.

    Args:
        name: unique id.
        turns: the conversation; the last answer is the gold one where the record is for evaluation.
        kind: question kind, caption, description or text.
        phrasing: train or heldout.
        image: path below ``images/``; None for a text-only record.
        scene_id: scene of the image.
        **extra: further fields, such as ``benchmark``.
    """
    record: Record = {"id": name}
    if image is not None:
        record |= {"image": image, "scene": scene_id}
    record["conversations"] = as_messages(turns, with_image=image is not None)
    return record | {"kind": kind, "phrasing": phrasing, "open": turns[-1][1] not in ("yes", "no")} | extra


def preference_record(
    name: str, request: str, chosen: str, rejected: str, *, kind: str, image: str, scene_id: str, **extra: Any
) -> Record:
    """A preference pair; both conversations repeat the request."""
    record: Record = {"id": name, "image": image, "scene": scene_id, "kind": kind}
    record["chosen"] = as_messages([(request, chosen)], with_image=True)
    record["rejected"] = as_messages([(request, rejected)], with_image=True)
    return record | extra


def as_messages(turns: Sequence[Turn], *, with_image: bool) -> list[dict[str, str]]:
    """Turns as LLaVA messages, the image token on a line of its own before the first."""
    messages = []
    for index, (human, gpt) in enumerate(turns):
        prefix = f"{IMAGE_TOKEN}\n" if with_image and index == 0 else ""
        messages += [{"from": "human", "value": prefix + human}, {"from": "gpt", "value": gpt}]
    return messages


def check_record(record: Mapping[str, Any]) -> None:
    """Check the LLaVA format of a record.

    Raises:
        ValueError: the id and what is wrong.
    """
    for key in ("id", "kind"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise ValueError(f"record {record.get('id')!r}: {key} must be a non-empty string, got {record.get(key)!r}")
    if "chosen" in record:
        conversations = [record["chosen"], record.get("rejected")]
    else:
        conversations = [record.get("conversations")]
        if record.get("phrasing") not in PHRASING_SPLITS:
            raise ValueError(f"record {record['id']}: phrasing must be one of {PHRASING_SPLITS}")
    for messages in conversations:
        _check_messages(record["id"], messages, has_image="image" in record)


def _check_messages(name: str, messages: Any, *, has_image: bool) -> None:
    if not messages or len(messages) % 2:
        raise ValueError(f"record {name}: turns must be pairs of human and gpt, got {len(messages or [])} messages")
    for index, message in enumerate(messages):
        speaker = ("human", "gpt")[index % 2]
        if message.get("from") != speaker or not message.get("value"):
            raise ValueError(f"record {name}: message {index} must be a non-empty one from {speaker}, got {message}")
    images = sum(message["value"].count(IMAGE_TOKEN) for message in messages)
    if images != int(has_image) or (has_image and not messages[0]["value"].startswith(IMAGE_TOKEN + "\n")):
        raise ValueError(f"record {name}: {images} image tokens, expected {int(has_image)} at the start")


def count_by_kind(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Number of records of each kind."""
    return dict(sorted(Counter(record["kind"] for record in records).items()))


def majority_accuracy(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy, per kind, of always giving the kind's most frequent last answer: a floor for any blind model."""
    answers: dict[str, Counter[str]] = {}
    for record in records:
        answers.setdefault(record["kind"], Counter())[record["conversations"][-1]["value"]] += 1
    return {kind: max(counts.values()) / counts.total() for kind, counts in sorted(answers.items())}
