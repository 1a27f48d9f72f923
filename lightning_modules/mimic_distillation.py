"""Mimic distillation: a student learns a teacher's next-token distributions on given answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

from lightning_modules.base import ROUTER_LOSSES, VLMStage
from lightning_modules.distillation_terms import TERM_WEIGHTS, DistillationTerms, TermSettings, build_projections
from lightning_modules.mimic_passes import MimicPasses
from lightning_modules.mimic_settings import MimicSettings, split_settings
from lightning_modules.objective import Objective, Weight
from lightning_modules.on_policy import OnPolicy
from lightning_modules.several_teachers import Teachers
from lightning_modules.stage import BUILDERS, MakeOptimizer, MakeScheduler
from lightning_modules.teachers import TeacherOptions
from moevlm.batch import DEFAULT_VIEW, VLMBatch, VLMOutput, VocabularyMatch
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
        trainable: Sequence[str] = ("^connector", "^language_model"),
        loss_weights: Mapping[str, Weight] | None = None,
        terms: Mapping[str, Any] | None = None,
        build_teachers: Mapping[str, Callable[[], VLM]] | None = None,
        teacher_of_source: Sequence[str] | None = None,
        teacher_options: Mapping[str, Any] | None = None,
        on_policy: Mapping[str, Any] | None = None,
        **settings: Unpack[MimicSettings],
    ) -> None:
        """Losses: kd, lm, load_balancing, router_z; given a weight, visual_kd, hidden, relation, affinity, attention.

        The other settings are those of `MimicSettings` and `Stage`.

        Args:
            build_model: the student.
            build_teacher: frozen; of the same tokenizer, of any width, with any number of visual tokens.
            terms: layers and distances of the further terms, see `TermSettings`.
            build_teachers: several by name, in place of `build_teacher`; each sequence is taught by one of them.
            teacher_of_source: the teacher's name for every data source, in the order of ``data.sources``.
            teacher_options: placement, quantization, share_vision; see `TeacherOptions`.
            on_policy: ``{fraction, max_new_tokens, temperature}``, see `OnPolicy`: in that share of the steps the
                student answers for itself, and only the divergence counts (GKD).
        """
        tokens, others = split_settings(settings)
        super().__init__(build_model, optimizer, scheduler, trainable=trainable, loss_weights=loss_weights, **others)
        self.tokens = tokens
        self.measures_gradients = self.adaptive is not None and self.adaptive.rule == "gradient_norm"
        if self.tokens.tokens != "answer" and self.measures_gradients:
            raise ValueError("gradient_norm compares kd and lm on the same tokens; set stage.kd_tokens=answer")
        self.wanted = [name for name in self.default_weights if self.is_weighted(name)]
        self.term_settings = TermSettings.parse(terms, self.wanted)
        self.save_hyperparameters(ignore=BUILDERS)
        self.teachers = Teachers.parse(build_teacher, build_teachers, teacher_of_source)
        self.teacher_options, self.on_policy = TeacherOptions.parse(teacher_options), OnPolicy.parse(on_policy)
        if self.on_policy is not None and self.tokens.cross_tokenizer is not None:
            raise ValueError("the student's own answers have no tokens of another tokenizer; set stage.on_policy=null")
        self.terms: dict[str, DistillationTerms] = {}  # by teacher at hand

    def build_beside(self, model: VLM) -> None:
        """What a cache does not hold of the frozen teachers, and projections to their states."""
        cached = self.provided("rows")
        for name, build in self.teachers.builders.items():
            if cached == ["hidden"]:
                self.set_teacher_head(build().head)
            elif not cached:
                teacher = build()
                self.terms[name] = DistillationTerms(self.term_settings, self.wanted, model, teacher)
                self.set_teacher(teacher, self.teacher_options, model, name=name)
        further = [name for name in ("visual_kd", *TERM_WEIGHTS) if name in self.wanted]
        if cached:
            if self.on_policy is not None:
                raise ValueError("a cache cannot judge the student's own answers; set data.teacher_cache=null")
            self.tokens.check_answers_suffice(further, "a teacher cache", "data.teacher_cache=null")
        if self.tokens.cross_tokenizer is not None:
            self.tokens.check_answers_suffice(further, "a teacher of another tokenizer", "stage.cross_tokenizer=null")
            self.match = self.vocabulary_match()
        self.set_beside(build_projections(self.terms, self.seed))

    @property
    def is_on_policy(self) -> bool:
        """Whether the present training step is one of the student's own answers."""
        return self.on_policy is not None and self.training and self.on_policy.is_drawn(self.seed, self.global_step)

    def prepare_step(self, micro_batches: list[Any]) -> list[Any]:
        if not self.is_on_policy or self.on_policy is None:
            return micro_batches
        return self.on_policy.answer_step(self.model, micro_batches, self.seed, self.global_rank, self.global_step)

    def step_weights(self) -> dict[str, float]:
        """On its own answers a student has nothing to imitate but the teacher: lm is worth nothing there."""
        weights = super().step_weights()
        return {**weights, "lm": 0.0} if self.is_on_policy else weights

    def count_units(self, batch: VLMBatch) -> dict[str, int]:
        kinds = {
            self.tokens.tokens,
            self.term_settings.hidden_tokens,
            *(["visual"] if "visual_kd" in self.wanted else []),
        }
        counts = self.model.visual_token_counts(batch, batch.num_images, DEFAULT_VIEW)
        further = count_units_of(kinds, batch, visual_tokens=counts, affinity_fraction=self.tokens.affinity_fraction)
        spans = 0 if batch.spans is None else len(batch.spans.bounds)
        return {**super().count_units(batch), "images": batch.num_images, "spans": spans, **further}

    def compute_losses(self, batch: VLMBatch) -> Objective:
        return self.teachers.teach(batch, self._mimic)

    def _mimic(self, batch: VLMBatch, name: str) -> Objective:
        if (batch.teacher_batch is None) != (self.tokens.cross_tokenizer is None):
            raise ValueError(
                "stage.cross_tokenizer and data.cross_tokenizer (with data.teacher_processor) come together; set both, "
                "or neither"
            )
        if batch.teacher_batch is not None:
            student = self.model(batch)
            objective = self._passes().over_spans(batch, student, self.frozen[name].model, self.match)
        elif batch.cached_rows is not None:
            student = self.model(batch)
            objective = self._passes().over_cache(batch.cached_rows, batch, student, self.teacher_head)
        else:
            objective, student = self._mimic_at_hand(batch, name)
        if "lm" not in objective.losses and self.is_weighted("lm"):
            objective.losses["lm"] = cross_entropy(student, self.model.head, batch.labels, kernel=self.loss_kernel)
        objective.losses |= self.router_losses(student)
        return objective

    def _mimic_at_hand(self, batch: VLMBatch, name: str) -> tuple[Objective, VLMOutput]:
        """Everything that a teacher of the same tokenizer can be asked."""
        terms = self.terms[name]
        student = self.model(batch, **terms.student_keeps())
        output = self.ask_teacher(batch, student, name=name, keep=terms.teacher_keeps())
        teacher = self.frozen[name].model
        objective = self._passes().against(teacher, batch, student, output, visual="visual_kd" in self.wanted)
        counts = self.model.visual_token_counts(batch, batch.num_images, DEFAULT_VIEW)
        projections = [module for key, module in self.beside.items() if key.startswith(f"{name}_hidden_")]
        objective.losses |= terms.losses(batch, student, output, projections, visual_tokens=counts)
        return objective, student

    def _passes(self) -> MimicPasses:
        """Made behind the student's forward pass, in which FSDP2 gathers the head."""
        head, weights = self.model.head, self.step_weights()
        return MimicPasses(head, self.tokens, weights, self.measures_gradients, self.loss_kernel)
