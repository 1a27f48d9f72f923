"""Frozen models beside the one that trains: where they live, in which precision, whose image features they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moevlm.batch import DEFAULT_VIEW, VLMBatch, VLMOutput
from moevlm.models.offloading import stream_blocks
from moevlm.models.quantization import check_quantization, quantize_linears
from moevlm.models.sharding import shard
from moevlm.models.vision_weights import hash_encoder
from moevlm.models.vlm import VLM

PLACEMENTS = ("auto", "sharded", "replicated", "offloaded")


@dataclass(frozen=True)
class TeacherOptions:
    """How a frozen model is kept.

    Attributes:
        placement: "sharded" over the ranks (FSDP2 only), "replicated" on every rank's device, "offloaded" to the
            host's memory (sharded there, too, under FSDP2), or "auto": sharded where the model that trains is.
        quantization: "int8" stores linear weights in 8 bits; null keeps the precision of the teacher's folder.
        share_vision: take the student's image features where both have the same frozen vision encoder, so that every
            image is encoded once.
    """

    placement: str = "auto"
    quantization: str | None = None
    share_vision: bool = True

    @classmethod
    def parse(cls, values: Mapping[str, Any] | None) -> TeacherOptions:
        """From a config's mapping; refuses unknown keys and values, and kinds whose library is missing."""
        given = dict(values or {})
        known = list(cls.__dataclass_fields__)
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"unknown teacher options {unknown}; known: {', '.join(known)}; set stage.teacher_options")
        options = cls(**given)
        if options.placement not in PLACEMENTS:
            raise ValueError(
                f"a teacher's placement must be one of {', '.join(PLACEMENTS)}, got {options.placement!r}; "
                "set stage.teacher_options.placement"
            )
        if options.quantization is not None and options.placement == "sharded":
            raise ValueError(
                "8-bit weights cannot be sharded; set stage.teacher_options.placement=replicated or offloaded, or "
                "stage.teacher_options.quantization=null"
            )
        check_quantization(options.quantization)
        return options


def place_teacher(
    teacher: VLM, options: TeacherOptions, *, device_mesh: Any = None, param_dtype: str | None = None
) -> Callable[[torch.device], None]:
    """Freeze a teacher and keep it as the options say.

    Args:
        device_mesh: of the ranks that shard the model that trains; None when it is not sharded.
        param_dtype: of the computation, when sharded.

    Returns:
        What moves the teacher to the device that the stage runs on; it may be called again.

    Raises:
        ValueError: a placement that this run's strategy cannot give.
    """
    teacher.requires_grad_(False).eval()
    placement = options.placement
    if placement == "auto":
        placement = "sharded" if device_mesh is not None and options.quantization is None else "replicated"
    if placement == "sharded" and device_mesh is None:
        raise ValueError("a sharded teacher needs a sharded run; set trainer=fsdp or stage.teacher_options.placement")
    if options.quantization is not None:
        quantize_linears(teacher, options.quantization)
    is_offloaded = placement == "offloaded"
    if placement == "sharded" or (is_offloaded and device_mesh is not None and options.quantization is None):
        shard(teacher, device_mesh, param_dtype=param_dtype, offload=is_offloaded)
        return lambda device: None if is_offloaded else _move(teacher, device)
    if is_offloaded:
        return _StreamOnce(teacher)
    return lambda device: _move(teacher, device)


class _StreamOnce:
    """Sets the streaming up when the device is known; later calls find it done."""

    def __init__(self, teacher: VLM) -> None:
        self.teacher, self.is_done = teacher, False

    def __call__(self, device: torch.device) -> None:
        if not self.is_done:
            stream_blocks(self.teacher, device)
            self.is_done = True


def _move(teacher: VLM, device: torch.device) -> None:
    teacher.to(device)


def has_same_vision(student: VLM, teacher: VLM, trainable: Sequence[str]) -> bool:
    """Whether both encode an image to the same features: equal weights, which the student does not train.

    A teacher in half precision is compared in its own; then the student's features are the more exact ones.
    """
    mine, other = student.vision_encoder, teacher.vision_encoder
    if mine is None or other is None or mine.config != other.config:
        return False
    own: dict[str, nn.Parameter] = dict(mine.named_parameters())
    names = [f"vision_encoder.{name}" for name in own]
    if any(re.search(pattern, name) for pattern in trainable for name in names):
        return False
    theirs = dict(other.named_parameters())
    return own.keys() == theirs.keys() and all(
        own[name].shape == value.shape and torch.equal(own[name].to(value.dtype), value)
        for name, value in theirs.items()
    )


def check_vision_cache(model: VLM, trainable: Sequence[str], stored: Sequence[str]) -> None:
    """Refuse cached features of another encoder than the model's, or for one that trains.

    Args:
        stored: hash of the encoder whose features the batches carry; empty for none.
    """
    if not stored:
        return
    encoder, remedy = model.vision_encoder, "set data.vision_cache.enabled=false"
    if encoder is None:
        raise ValueError(f"a blind model reads no image features; {remedy}")
    if any(re.search(p, f"vision_encoder.{name}") for p in trainable for name, _ in encoder.named_parameters()):
        raise ValueError(f"the vision encoder trains, so its features cannot come from a cache; {remedy}")
    if hash_encoder(encoder) != stored[0]:
        raise ValueError(
            "the cached features are of another vision encoder than the model's; set data.vision_cache.vision_encoder "
            f"and weights to the model's, or {remedy}"
        )


def shared_features(batch: VLMBatch, output: VLMOutput, *, view: str) -> torch.Tensor | None:
    """The student's image features for a teacher of the same encoder; None when it sees the images otherwise."""
    return None if view in batch.images and view != DEFAULT_VIEW else output.visual_features
