"""Mimic distillation: a student learns a teacher's next-token distributions on given answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

from lightning_modules.base import ROUTER_LOSSES, VLMStage
from lightning_modules.distillation_terms import TERM_WEIGHTS, DistillationTerms, build_projections, projections_of
from lightning_modules.mimic_passes import MimicPasses
from lightning_modules.mimic_settings import MimicPlan, MimicSettings, shared_settings
from lightning_modules.objective import Objective, Weight
from lightning_modules.several_teachers import Teachers
from lightning_modules.stage import BUILDERS, MakeOptimizer, MakeScheduler
from moevlm.batch import DEFAULT_VIEW, VLMBatch, VocabularyMatch
from moevlm.losses.language_modeling import cross_entropy
from moevlm.losses.selection import count_units_of
from moevlm.models.vlm import VLM


class MimicDistillation(VLMStage):
    """Knowledge distillation on the supervised tokens (LLaVA-MoD, arXiv:2408.15881, mimic distillation).

    Dense-to-dense is a dense student with the defaults here; dense-to-sparse is a sparse student with
    ``trainable`` of MoE tuning and ``loss_weights: {lm: 1.0}``: two configurations of one stage.
    """

    default_weights = {"kd": 1.0, "lm": 0.0, "visual_kd": 0.0, **TERM_WEIGHTS, **ROUTER_LOSSES}
    measured_gradients = ("kd", "lm")
    match: VocabularyMatch | None = None  # of the student's and a cross-tokenizer teacher's vocabularies

    def __init__(
        self,
        build_model: Callable[[], VLM],
        build_teacher: Callable[[], VLM] | None,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        *,
        build_teachers: Mapping[str, Callable[[], VLM]] | None = None,
        teacher_of_source: Sequence[str] | None = None,
        trainable: Sequence[str] = ("^connector", "^language_model"),
        loss_weights: Mapping[str, Weight] | None = None,
        **settings: Unpack[MimicSettings],
    ) -> None:
        """Losses: kd, lm, load_balancing, router_z; given a weight, visual_kd, hidden, relation, affinity, attention.

        The other settings are those of `MimicSettings` and `Stage`.

        Args:
            build_model: the student.
            build_teacher: frozen; of any width, with any number of visual tokens, of another tokenizer if
                `cross_tokenizer` is set.
            build_teachers: several by name, in place of `build_teacher`; each sequence is taught by one of them.
            teacher_of_source: the teacher's name for every data source, in the order of ``data.sources``.
        """
        shared = shared_settings(settings)
        super().__init__(build_model, optimizer, scheduler, trainable=trainable, loss_weights=loss_weights, **shared)
        self.save_hyperparameters(ignore=BUILDERS)
        wanted = [name for name in self.default_weights if self.is_weighted(name)]
        measures_gradients = self.adaptive is not None and self.adaptive.rule == "gradient_norm"
        self.plan = MimicPlan.parse(settings, wanted, measures_gradients=measures_gradients)
        self.teachers = Teachers.parse(build_teacher, build_teachers, teacher_of_source)
        self.terms: dict[str, DistillationTerms] = {}  # by teacher at hand

    def build_beside(self, model: VLM) -> None:
        """The frozen teachers, as far as no cache stands for them, and projections to their states."""
        cached = self.provided("rows")
        if cached:
            self.plan.check_answers_suffice("a teacher cache", "data.teacher_cache=null")
        for name, build in self.teachers.builders.items():
            if not cached:
                teacher = build()
                self.terms[name] = DistillationTerms(self.plan.terms, self.plan.wanted, model, teacher)
                self.set_teacher(teacher, self.plan.teacher_options, model, name=name)
            elif cached == ["hidden"]:
                self.set_teacher_head(build().head)
        self.match = self.vocabulary_match()
        self.set_beside(build_projections(self.terms, self.seed))

    @property
    def is_on_policy(self) -> bool:
        """Whether the present training step is one of the student's own answers."""
        return self.training and self.plan.on_policy.is_drawn(self.seed, self.global_step)

    def prepare_step(self, micro_batches: list[Any]) -> list[Any]:
        if not self.is_on_policy:
            return micro_batches
        return self.plan.on_policy.answer_step(self.model, micro_batches, self.seed, self.global_rank, self.global_step)

    def step_weights(self) -> dict[str, float]:
        """On its own answers a student has nothing to imitate but the teacher: lm is worth nothing there."""
        weights = super().step_weights()
        return {**weights, "lm": 0.0} if self.is_on_policy else weights

    def count_units(self, batch: VLMBatch) -> dict[str, int]:
        kinds = {"visual", self.plan.tokens.selection, self.plan.terms.hidden_tokens}
        fraction = self.plan.tokens.affinity_fraction
        visual = self.model.visual_token_counts(batch, batch.num_images, DEFAULT_VIEW)
        further = count_units_of(kinds, batch, visual_tokens=visual, affinity_fraction=fraction)
        spans = 0 if batch.spans is None else len(batch.spans.bounds)
        return {**super().count_units(batch), "images": batch.num_images, "spans": spans, **further}

    def compute_losses(self, batch: VLMBatch) -> Objective:
        return self.teachers.teach(batch, self._mimic)

    def _mimic(self, batch: VLMBatch, name: str) -> Objective:
        """The objective of sequences that one teacher teaches."""
        self.plan.tokens.check_tokenizers(batch)
        student = self.model(batch, **(self.terms[name].student_keeps() if self.terms else {}))
        head = self.model.head  # read behind the forward pass, in which FSDP2 gathers it
        passes = MimicPasses(head, self.plan, self.step_weights(), self.loss_kernel)
        if batch.teacher_batch is not None:
            objective = passes.over_spans(batch, student, self.frozen[name].model, self.match)
        elif batch.cached_rows is not None:
            objective = passes.over_cache(batch, student, self.teacher_head)
        else:
            terms, teacher = self.terms[name], self.frozen[name].model
            output = self.ask_teacher(batch, student, name=name, keep=terms.teacher_keeps())
            objective = passes.against(teacher, batch, student, output)
            visual = self.model.visual_token_counts(batch, batch.num_images, DEFAULT_VIEW)
            projections = projections_of(self.beside, name)
            objective.losses |= terms.losses(batch, student, output, projections, visual_tokens=visual)
        if "lm" not in objective.losses and self.is_weighted("lm"):
            objective.losses["lm"] = cross_entropy(student, head, batch.labels, kernel=self.loss_kernel)
        objective.losses |= self.router_losses(student)
        return objective
