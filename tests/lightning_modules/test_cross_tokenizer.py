"""A teacher with another tokenizer, another chat template and another number of visual tokens."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.teacher_view import add_teacher_view
from lightning_modules.mimic_distillation import MimicDistillation
from moevlm.batch import Record, Turn, VLMBatch
from moevlm.preprocessing.alignment import match_vocabularies
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.images import ImageTransform
from moevlm.preprocessing.processor import Processor
from tests.lightning_modules.runs import adamw, fit, make_batch
from tests.samples import image_bytes, llama_tokenizer, small_tokenizer
from tests.tiny import IMAGE_SIZE, tiny_decoder_config, tiny_vlm

STUDENT = Processor(small_tokenizer(), "chatml", ImageTransform(IMAGE_SIZE), num_visual_tokens=16)
TEACHER = Processor(llama_tokenizer(), "vicuna_v1", ImageTransform(IMAGE_SIZE), num_visual_tokens=4)


def build(tokenizer: Any, seed: int, **options: Any) -> Any:
    config = tiny_decoder_config(num_hidden_layers=2, vocab_size=len(tokenizer) + 7, hidden_size=32)
    vlm = tiny_vlm(seed=seed, language_model=config, **options)
    vlm.language_model.get_output_embeddings().weight.data *= 20  # a teacher with something to say
    return vlm


build_student = partial(build, STUDENT.tokenizer, 1)
build_teacher = partial(build, TEACHER.tokenizer, 2, connector="pool_mlp2x_gelu")


def batch() -> VLMBatch:
    both = add_teacher_view(STUDENT, TEACHER, cross_tokenizer=True)
    records = [
        Record(f"s{n}", (Turn("user", "<image>\nWhat is it?"), Turn("assistant", answer)), (image_bytes(n),))
        for n, answer in enumerate(["A red circle.", "Grass and a blue square"])
    ]
    return pack([sample for record in records for sample in both.encode(record)])


@pytest.mark.parametrize("method", ["uld", "gold"])
def test_a_student_learns_from_a_teacher_of_another_tokenizer(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        MimicDistillation,
        "vocabulary_match",
        lambda _: match_vocabularies(STUDENT.tokenizer, TEACHER.tokenizer),
    )
    losses = []
    for num_steps in (1, 15):
        stage = MimicDistillation(
            build_student, build_teacher, adamw, cross_tokenizer=method, loss_weights={"load_balancing": 0.0}
        )
        losses.append(float(fit(stage, [batch()] * num_steps).callback_metrics["train/kd_loss"]))
    assert 0 < losses[1] < 0.6 * losses[0], losses


def test_options_that_do_not_fit_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"the student's token \d+ is .* data.cross_tokenizer=true"):
        add_teacher_view(STUDENT, TEACHER)
    with pytest.raises(ValueError, match=r"needs the teacher's processor; set data.teacher_processor"):
        add_teacher_view(STUDENT, None, cross_tokenizer=True)
    with pytest.raises(ValueError, match="come together; set both, or neither"):
        fit(MimicDistillation(build_student, build_teacher, adamw), [batch()])
    stage = MimicDistillation(build_student, build_teacher, adamw, cross_tokenizer="uld")
    with pytest.raises(ValueError, match="come together; set both, or neither"):
        fit(stage, [make_batch()])
    further: list[tuple[dict[str, Any], str]] = [
        ({"loss_weights": {"hidden": 1.0, "visual_kd": 1.0}}, "visual_kd, hidden"),
        ({"kd_tokens": "all"}, "kd_tokens=all"),
        ({"on_policy": {"fraction": 0.5}}, "on_policy"),
    ]
    for options, named in further:
        message = f"another tokenizer knows the given answers' tokens only, not what {named} looks at"
        with pytest.raises(ValueError, match=message):
            MimicDistillation(build_student, build_teacher, adamw, cross_tokenizer="uld", **options)
    with pytest.raises(ValueError, match=r"cannot be cut; give stage.build_teacher alone"):
        batch().select([0])


def test_the_stage_asks_the_datamodule_for_the_shared_tokens() -> None:
    stage = MimicDistillation(build_student, build_teacher, adamw, cross_tokenizer="gold")
    match = match_vocabularies(STUDENT.tokenizer, TEACHER.tokenizer)
    stage._trainer = SimpleNamespace(datamodule=SimpleNamespace(vocabulary_match=match))
    found = stage.vocabulary_match()
    assert found is not None
    assert torch.equal(found.student_ids, match.student_ids)
