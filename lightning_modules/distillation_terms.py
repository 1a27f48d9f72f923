"""The terms of distillation beside the token loss: which layers they look at, and what they are made from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.objective import Weight
from moevlm.batch import VLMBatch, VLMOutput
from moevlm.losses.attention_maps import DISTANCES, LayerGroups, attention_map_loss, middle_layer_groups
from moevlm.losses.hidden import affinity_mse, hidden_mse, visual_relation_loss
from moevlm.losses.mean import Mean
from moevlm.losses.selection import UNIT_OF, select
from moevlm.models.projection import build_projection
from moevlm.models.vlm import VLM

TERM_WEIGHTS: dict[str, Weight] = dict.fromkeys(("hidden", "relation", "affinity", "attention"), 0.0)
"""Terms on states and maps; visual_kd, of the vocabulary, is made by the stage. A positive weight turns one on."""


@dataclass(frozen=True)
class TermSettings:
    """What `stage.terms` holds; formulas in `moevlm.losses.hidden` and `moevlm.losses.attention_maps`.

    Attributes:
        hidden_layers: pairs (student layer, teacher layer) of "hidden"; null: the last states, after the final norm.
        hidden_tokens: a selection of `moevlm.losses.selection`, but "affinity".
        hidden_projection: "mlp" or "linear", to the teacher's width.
        attention_layers: pairs (student layer, teacher layers) of "attention"; null: CompoDistill's middle layers.
        attention_distance: "cosine" or "mse".
    """

    hidden_layers: Sequence[tuple[int, int]] | None = None
    hidden_tokens: str = "answer"
    hidden_projection: str = "mlp"
    attention_layers: LayerGroups | None = None
    attention_distance: str = "cosine"

    @classmethod
    def parse(cls, values: Mapping[str, Any] | None, wanted: Collection[str]) -> TermSettings:
        """From a config's mapping.

        Args:
            wanted: names of the losses with a weight.

        Raises:
            ValueError: an unknown key or value, or a setting of a term that has no weight.
        """
        given = dict(values or {})
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"unknown terms settings {unknown}; known: {known}; set stage.terms")
        for key in given:
            term = key.split("_")[0]
            if term not in wanted:
                raise ValueError(f"terms.{key} has no effect while loss {term!r} has no weight; set stage.loss_weights")
        settings = cls(**given)
        if settings.hidden_tokens not in UNIT_OF or settings.hidden_tokens == "affinity":
            known = ", ".join(kind for kind in UNIT_OF if kind != "affinity")
            raise ValueError(
                f"hidden_tokens must be one of {known}, got {settings.hidden_tokens!r}; set stage.terms.hidden_tokens"
            )
        if settings.attention_distance not in DISTANCES:
            raise ValueError(
                f"attention_distance must be one of {DISTANCES}, got {settings.attention_distance!r}; "
                "set stage.terms.attention_distance"
            )
        build_projection(settings.hidden_projection, 1, 1)
        return settings


class DistillationTerms:
    """The terms that have a weight, for one student and one teacher."""

    def __init__(self, settings: TermSettings, wanted: Collection[str], student: VLM, teacher: VLM) -> None:
        self.settings, self.wanted = settings, frozenset(wanted) & set(TERM_WEIGHTS)
        student_config, teacher_config = student.language_model.config, teacher.language_model.config
        self.widths = student_config.hidden_size, teacher_config.hidden_size
        self.groups: LayerGroups = settings.attention_layers or middle_layer_groups(
            student_config.num_hidden_layers, teacher_config.num_hidden_layers
        )

    def projections(self) -> list[nn.Module]:
        """One for each pair of layers of "hidden"; none when it has no weight."""
        count = len(self.settings.hidden_layers or [()]) if "hidden" in self.wanted else 0
        return [build_projection(self.settings.hidden_projection, *self.widths) for _ in range(count)]

    def student_keeps(self) -> dict[str, list[int]]:
        """What the student's forward pass must return beside its last states."""
        return self._keeps(0)

    def teacher_keeps(self) -> dict[str, list[int]]:
        """What the teacher's must."""
        return self._keeps(1)

    def losses(
        self,
        batch: VLMBatch,
        student: VLMOutput,
        teacher: VLMOutput,
        projections: Sequence[nn.Module],
        *,
        visual_tokens: Sequence[int],
    ) -> dict[str, Mean]:
        """The wanted terms by name, unweighted.

        Args:
            projections: as made by `projections`, by now trained and sharded.
            visual_tokens: [N] what each image takes.
        """
        losses: dict[str, Mean] = {}
        last = student.hidden_states, teacher.hidden_states
        if "hidden" in self.wanted:
            losses["hidden"] = self._hidden(batch, student, teacher, projections)
        if "relation" in self.wanted:
            losses["relation"] = visual_relation_loss(*last, student, teacher, visual_tokens=visual_tokens)
        answers = select("answer", batch, student, teacher)
        rows = answers.student_rows, answers.teacher_rows
        if "affinity" in self.wanted:
            losses["affinity"] = affinity_mse(*last, student, teacher, rows)
        if "attention" in self.wanted:
            distance = self.settings.attention_distance
            losses["attention"] = attention_map_loss(student, teacher, self.groups, rows, distance=distance)
        return losses

    def _hidden(
        self, batch: VLMBatch, student: VLMOutput, teacher: VLMOutput, projections: Sequence[nn.Module]
    ) -> Mean:
        chosen = select(self.settings.hidden_tokens, batch, student, teacher)
        pairs: list[tuple[Tensor, Tensor]] = [(student.hidden_states, teacher.hidden_states)]
        if self.settings.hidden_layers is not None:
            pairs = [(student.layers[own], teacher.layers[other]) for own, other in self.settings.hidden_layers]
        terms = [
            hidden_mse(projection(own_UD[chosen.student_rows]), other_UD[chosen.teacher_rows], chosen.unit).sum
            for projection, (own_UD, other_UD) in zip(projections, pairs)
        ]
        return Mean(torch.stack(terms).mean(), len(chosen.student_rows), chosen.unit)

    def _keeps(self, side: int) -> dict[str, list[int]]:
        layers: list[int] = []
        if "hidden" in self.wanted and self.settings.hidden_layers is not None:
            layers = sorted({pair[side] for pair in self.settings.hidden_layers})
        attentions: set[int] = set()
        if "attention" in self.wanted:
            for own, others in self.groups:
                attentions |= {own} if side == 0 else set(others)
        return {"keep_layers": layers, "keep_attentions": sorted(attentions)}


def build_projections(terms: Mapping[str, DistillationTerms], seed: int) -> nn.ModuleDict:
    """The projections of every teacher as ``<teacher>_hidden_<pair>``, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lists = {name: one.projections() for name, one in terms.items()}
    return nn.ModuleDict({f"{name}_hidden_{i}": one for name, found in lists.items() for i, one in enumerate(found)})


def projections_of(modules: nn.ModuleDict, teacher: str) -> list[nn.Module]:
    """Those of one teacher, pair by pair, out of what `build_projections` made."""
    return [module for name, module in modules.items() if name.startswith(f"{teacher}_hidden_")]
