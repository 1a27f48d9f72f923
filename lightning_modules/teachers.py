"""Frozen models beside the one that trains: where they live, in which precision, which sample each of them teaches."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_modules.objective import Objective
from moevlm.batch import DEFAULT_VIEW, Routing, VLMBatch, VLMOutput
from moevlm.losses.mean import Mean
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


def split_by_teacher(batch: VLMBatch, teacher_of_source: Sequence[str]) -> Iterator[tuple[str, VLMBatch, bool]]:
    """A micro-batch cut into one part for each teacher: (teacher, part, whether it holds sequences of its own).

    A teacher without a sequence gets the first one: under FSDP2 every rank runs every model. What it says is not used.

    Args:
        teacher_of_source: name of the teacher of each data source, in the order of the sources.
    """
    sources = batch.sources.tolist()
    if sources and max(sources) >= len(teacher_of_source):
        raise ValueError(
            f"a sample of source {max(sources)}, but stage.teacher_of_source names the teachers of "
            f"{len(teacher_of_source)} sources; name one for every source of data.sources, in their order"
        )
    owners = [teacher_of_source[source] for source in sources]
    for teacher in sorted(set(teacher_of_source)):
        rows = [row for row, owner in enumerate(owners) if owner == teacher]
        yield teacher, batch.select(rows or [0]), bool(rows)


def name_teachers(
    single: Any, several: Mapping[str, Any] | None, teacher_of_source: Sequence[str] | None
) -> dict[str, Any]:
    """The builders of a stage's teachers by name; a single one is called "teacher".

    Raises:
        ValueError: none or both kinds of teachers are given, or a source's teacher is none of them.
    """
    if (single is None) == (not several):
        raise ValueError("a teacher is needed: set either stage.build_teacher or stage.build_teachers")
    if bool(several) != bool(teacher_of_source):
        raise ValueError("stage.build_teachers and stage.teacher_of_source come together; set both or neither")
    builders = dict(several or {"teacher": single})
    unknown = [name for name in teacher_of_source or [] if name not in builders]
    if unknown:
        raise ValueError(
            f"stage.teacher_of_source names {unknown[0]!r}, stage.build_teachers has {', '.join(builders)}; "
            "use one of these"
        )
    return builders


def join_objectives(parts: Sequence[tuple[Objective, bool]]) -> Objective:
    """The objective of a micro-batch that was cut in parts; a part that is not its own counts for nothing.

    That part is still tied to the gradient, with weight 0: under FSDP2 and DDP every rank takes part.
    """
    own = [objective for objective, is_own in parts if is_own]
    others = [objective for objective, is_own in parts if not is_own]
    losses = {name: _joined([one.losses[name] for one in own]) for name in own[0].losses}
    metrics = {name: _joined([one.metrics[name] for one in own]) for name in own[0].metrics}
    joint = tuple(_joined(list(means)) for means in zip(*(one.joint for one in own)))
    tied = [mean.sum for one in others for mean in [*one.losses.values(), *one.joint] if mean.sum.requires_grad]
    if tied:
        first = next(iter(losses))
        kept = losses[first]
        losses[first] = Mean(kept.sum + 0 * torch.stack(tied).sum(), kept.count, kept.unit)
    return Objective(losses, metrics, _joined_output([one.output for one in own]), joint)


def _joined(means: list[Mean]) -> Mean:
    return Mean(torch.stack([mean.sum for mean in means]).sum(), sum(mean.count for mean in means), means[0].unit)


def _joined_output(outputs: Sequence[VLMOutput | None]) -> VLMOutput | None:
    """What the callbacks look at: segments and routing records of all parts."""
    present = [output for output in outputs if output is not None]
    if len(present) < 2:
        return present[0] if present else None
    routings = {layer: _joined_routing([output.routings[layer] for output in present]) for layer in present[0].routings}
    segments = torch.cat([output.segments for output in present])
    return dataclasses.replace(present[0], segments=segments, routings=routings)


def _joined_routing(parts: list[Routing]) -> Routing:
    names = [
        item.name for item in dataclasses.fields(Routing) if isinstance(getattr(parts[0], item.name), torch.Tensor)
    ]
    tensors: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return dataclasses.replace(parts[0], **tensors)
