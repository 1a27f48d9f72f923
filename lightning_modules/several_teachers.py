"""Several teachers of one student: which sequences each of them teaches, and the objective of all together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_modules.objective import Objective
from moevlm.batch import Routing, VLMBatch, VLMOutput
from moevlm.losses.mean import Mean
from moevlm.models.vlm import VLM

SINGLE = "teacher"
"""The name of a teacher that has no other beside it."""


@dataclass(frozen=True)
class Teachers:
    """How the teachers of a stage are built, and which data sources each of them teaches."""

    builders: dict[str, Callable[[], VLM]]  # by name
    of_source: Sequence[str] | None = None  # the name for every data source, in their order; None for a single teacher

    @classmethod
    def parse(
        cls,
        single: Callable[[], VLM] | None,
        several: Mapping[str, Callable[[], VLM]] | None,
        of_source: Sequence[str] | None,
    ) -> Teachers:
        """From a stage's arguments.

        Raises:
            ValueError: none or both kinds of teachers are given, or a source's teacher is none of them.
        """
        if (single is None) == (not several):
            raise ValueError("a teacher is needed: set either stage.build_teacher or stage.build_teachers")
        if bool(several) != bool(of_source):
            raise ValueError("stage.build_teachers and stage.teacher_of_source come together; set both or neither")
        builders = dict(several or {}) if single is None else {SINGLE: single}
        unknown = [name for name in of_source or [] if name not in builders]
        if unknown:
            raise ValueError(
                f"stage.teacher_of_source names {unknown[0]!r}, stage.build_teachers has {', '.join(builders)}; "
                "use one of these"
            )
        return cls(builders, of_source or None)

    def teach(self, batch: VLMBatch, objective: Callable[[VLMBatch, str], Objective]) -> Objective:
        """The objective of a micro-batch whose sequences each have their own teacher; a cache speaks for all of them.

        Args:
            objective: of sequences that one teacher teaches, and its name.
        """
        if self.of_source is None or batch.cached_rows is not None:
            return objective(batch, SINGLE)
        parts = split_by_teacher(batch, self.of_source)
        return join_objectives([(objective(part, name), is_own) for name, part, is_own in parts])


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
