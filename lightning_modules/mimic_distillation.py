"""Mimic distillation: a student learns a teacher's next-token distributions on given answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

from lightning_modules.base import ROUTER_LOSSES, VLMStage
from lightning_modules.distillation_terms import (
    TERM_WEIGHTS,
    DistillationTerms,
    TermSettings,
    build_projections,
)
from lightning_modules.mimic_passes import TokenSettings, cached_teacher_rows, span_pass, token_pass
from lightning_modules.objective import Objective, Weight, step_seed
from lightning_modules.on_policy import OnPolicy
from lightning_modules.stage import BUILDERS, MakeOptimizer, MakeScheduler, VLMStageSettings
from lightning_modules.teachers import TeacherOptions, join_objectives, name_teachers, split_by_teacher
from moevlm.batch import DEFAULT_VIEW, VLMBatch, VLMOutput, VocabularyMatch
from moevlm.losses.divergences import Divergence
from moevlm.losses.language_modeling import cross_entropy
from moevlm.losses.selection import Selection, count_units_of, select
from moevlm.losses.teacher_rows import HeadRows, TeacherRows
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
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        divergence_beta: float = 0.5,
        divergence_skew: float = 0.1,
        z_normed: bool = False,
        token_weighting: str = "uniform",
        kd_tokens: str = "answer",
        affinity_fraction: float = 0.5,
        terms: Mapping[str, Any] | None = None,
        source_names: Sequence[str] = (),
        cross_tokenizer: str | None = None,
        unmatched_weight: float = 1.0,
        build_teachers: Mapping[str, Callable[[], VLM]] | None = None,
        teacher_of_source: Sequence[str] | None = None,
        teacher_options: Mapping[str, Any] | None = None,
        on_policy: Mapping[str, Any] | None = None,
        **settings: Unpack[VLMStageSettings],
    ) -> None:
        """Losses: kd, lm, load_balancing, router_z; given a weight, visual_kd, hidden, relation, affinity, attention.

        The other settings are those of `Stage`.

        Args:
            build_model: the student.
            build_teacher: frozen; of the same tokenizer, of any width, with any number of visual tokens.
            temperature: of both distributions; the loss is scaled by its square.
            divergence: a key of `moevlm.losses.divergences.DIVERGENCES`.
            divergence_beta: weight of the teacher in the mixture of "jsd".
            divergence_skew: share of the first argument in the mixture of the skewed divergences.
            z_normed: standardise each row of logits, as LLaVADI does.
            token_weighting: how much a token's divergence counts; one of `moevlm.losses.distillation.WEIGHTINGS`.
            kd_tokens: which tokens kd looks at; a selection of `moevlm.losses.selection`.
            affinity_fraction: the share of each answer's tokens that the selection "affinity" keeps.
            terms: layers and distances of the further terms, see `TermSettings`.
            source_names: of the data sources, in their order; kd and lm are then logged for each.
            cross_tokenizer: "uld" or "gold" for a teacher of another tokenizer, see `moevlm.losses.cross_tokenizer`.
            unmatched_weight: in "gold", of the tokens that only one of the vocabularies has.
            build_teachers: several by name, in place of `build_teacher`; each sequence is taught by one of them.
            teacher_of_source: the teacher's name for every data source, in the order of ``data.sources``.
            teacher_options: placement, quantization, share_vision; see `TeacherOptions`.
            on_policy: ``{fraction, max_new_tokens, temperature}``, see `OnPolicy`: in that share of the steps the
                student answers for itself, and only the divergence counts (GKD).
        """
        super().__init__(build_model, optimizer, scheduler, trainable=trainable, loss_weights=loss_weights, **settings)
        self.tokens = TokenSettings(
            Divergence(divergence, temperature, divergence_beta, divergence_skew, z_normed),
            token_weighting,
            kd_tokens,
            affinity_fraction,
            cross_tokenizer,
            unmatched_weight,
            list(source_names),
        )
        if kd_tokens != "answer" and self.adaptive is not None and self.adaptive.rule == "gradient_norm":
            raise ValueError("gradient_norm compares kd and lm on the same tokens; set stage.kd_tokens=answer")
        self.wanted = [name for name in self.default_weights if self.is_weighted(name)]
        self.term_settings = TermSettings.parse(terms, self.wanted)
        self.save_hyperparameters(ignore=BUILDERS)
        self.teacher_builders = name_teachers(build_teacher, build_teachers, teacher_of_source)
        self.teacher_of_source = teacher_of_source
        self.teacher_options, self.on_policy = TeacherOptions.parse(teacher_options), OnPolicy.parse(on_policy)
        if self.on_policy is not None and cross_tokenizer is not None:
            raise ValueError("the student's own answers have no tokens of another tokenizer; set stage.on_policy=null")
        self.terms: dict[str, DistillationTerms] = {}  # by teacher at hand

    def configure_model(self) -> None:
        """Build the student as every stage does, and what a cache does not hold of the frozen teachers."""
        if self.model is not None:
            return
        student = self.build_model()
        cached = {name.removeprefix("rows:") for name in self.provided() if name.startswith("rows:")}
        for name, build in self.teacher_builders.items():
            if cached == {"hidden"}:
                self.set_teacher_head(build().head)
            elif not cached:
                teacher = build()
                self.terms[name] = DistillationTerms(self.term_settings, self.wanted, student, teacher)
                self.set_teacher(teacher, self.teacher_options, student, name=name)
        if cached:
            if self.on_policy is not None:
                raise ValueError("a cache cannot judge the student's own answers; set data.teacher_cache=null")
            self._check_answers_suffice("a teacher cache", "data.teacher_cache=null")
        if self.tokens.cross_tokenizer is not None:
            self._check_answers_suffice("a teacher of another tokenizer", "stage.cross_tokenizer=null")
            self.match = self.vocabulary_match()
        self.set_model(student)
        self.set_beside(build_projections(self.terms, self.seed))

    @property
    def is_on_policy(self) -> bool:
        """Whether the present training step is one of the student's own answers."""
        return self.on_policy is not None and self.training and self.on_policy.is_drawn(self.seed, self.global_step)

    def prepare_step(self, micro_batches: list[Any]) -> list[Any]:
        if not self.is_on_policy or self.on_policy is None:
            return micro_batches
        seeds = [
            step_seed(self.seed + 1, self.global_rank, self.global_step * 1009 + n) for n in range(len(micro_batches))
        ]
        return [self.on_policy.answer(self.model, batch, seed) for batch, seed in zip(micro_batches, seeds)]

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
        if self.teacher_of_source is None or batch.cached_rows is not None:
            return self._mimic(batch)
        parts = split_by_teacher(batch, self.teacher_of_source)
        return join_objectives([(self._mimic(part, name), is_own) for name, part, is_own in parts])

    def _mimic(self, batch: VLMBatch, name: str = "teacher") -> Objective:
        if (batch.teacher_batch is None) != (self.tokens.cross_tokenizer is None):
            raise ValueError(
                "stage.cross_tokenizer and data.cross_tokenizer (with data.teacher_processor) come together; set both, "
                "or neither"
            )
        if batch.teacher_batch is not None:
            student = self.model(batch)
            teacher = self.frozen[name].model
            kd = span_pass(batch, student, self.model.head, teacher, self.match, self.tokens)
            objective = Objective({"kd": kd}, output=student)
        elif batch.cached_rows is not None:
            student = self.model(batch)
            rows_R, targets_R = student.prediction_rows(batch.labels)
            answers = Selection(rows_R, rows_R, targets_R, "targets")
            stored = cached_teacher_rows(batch.cached_rows, self.teacher_head, self.model.head.weight.shape[0])
            objective = self._token_pass("kd", answers, batch, student, stored)
        else:
            objective = self._mimic_at_hand(batch, name)
            student = objective.output
        if "lm" not in objective.losses and self.is_weighted("lm"):
            objective.losses["lm"] = cross_entropy(student, self.model.head, batch.labels, kernel=self.loss_kernel)
        objective.losses |= self.router_losses(student)
        return objective

    def _mimic_at_hand(self, batch: VLMBatch, name: str) -> Objective:
        """Everything that a teacher of the same tokenizer can be asked."""
        terms = self.terms[name]
        student = self.model(batch, **terms.student_keeps())
        teacher = self.ask_teacher(batch, student, name=name, keep=terms.teacher_keeps())
        rows = select(self.tokens.tokens, batch, student, teacher, affinity_fraction=self.tokens.affinity_fraction)
        objective = self._token_pass("kd", rows, batch, student, self._head_rows(name, teacher, rows))
        if "visual_kd" in self.wanted:
            visual = select("visual", batch, student, teacher)
            further = self._token_pass("visual_kd", visual, batch, student, self._head_rows(name, teacher, visual))
            objective.losses |= further.losses
            objective.joint += further.joint
        counts = self.model.visual_token_counts(batch, batch.num_images, DEFAULT_VIEW)
        projections = [module for key, module in self.beside.items() if key.startswith(f"{name}_hidden_")]
        objective.losses |= terms.losses(batch, student, teacher, projections, visual_tokens=counts)
        return objective

    def _token_pass(
        self, name: str, rows: Selection, batch: VLMBatch, student: VLMOutput, teacher: TeacherRows
    ) -> Objective:
        return token_pass(
            name,
            rows,
            batch,
            student,
            self.model.head,
            teacher,
            self.tokens,
            weights=self.step_weights(),
            kernel=self.loss_kernel,
            with_lm=name == "kd" and self.tokens.tokens == "answer",
            measure_gradients=self.adaptive is not None and self.adaptive.rule == "gradient_norm",
        )

    def _head_rows(self, name: str, teacher: VLMOutput, rows: Selection) -> HeadRows:
        """Read after the teacher's forward pass."""
        head, num_common = self.frozen[name].model.head, self.model.head.weight.shape[0]
        return HeadRows(teacher.hidden_states[rows.teacher_rows], head, num_common)

    def _check_answers_suffice(self, what: str, remedy: str) -> None:
        """Some sources hold what the teacher says of the answers' tokens, and nothing else."""
        asked = [name for name in ("visual_kd", *TERM_WEIGHTS) if name in self.wanted]
        asked += [] if self.tokens.tokens == "answer" else [f"kd_tokens={self.tokens.tokens}"]
        if asked:
            raise ValueError(
                f"{what} knows the answers' tokens only, not what {', '.join(asked)} looks at; set {remedy}, or "
                "weight 0 in stage.loss_weights and stage.kd_tokens=answer"
            )
