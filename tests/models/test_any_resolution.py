"""Tiled images in a model: every image takes its own number of tokens, and everything that counts tokens knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from moevlm.batch import DEFAULT_VIEW, IGNORE_INDEX, TEACHER_VIEW, EncodedSample, Record, Segment, Turn, VLMBatch
from moevlm.evaluation.generation import generate
from moevlm.models.pretrained import load_pretrained, save_pretrained
from moevlm.models.vlm import VLM
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.images import ImageTransform
from moevlm.preprocessing.processor import Processor
from tests.reference.tiling import joined
from tests.samples import png_of
from tests.tiny import IMAGE_SIZE, tiny_tokenizer, tiny_vlm

SIZES = [(70, 31), (20, 61), (64, 64)]
ROUNDS = (Turn("user", "<image>a <image>b"), Turn("assistant", "c"))


def picture(number: int) -> bytes:
    width, height = SIZES[number]
    return png_of(np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8))


def processor_of(mode: str) -> Processor:
    transform = ImageTransform(IMAGE_SIZE, mode=mode)
    return Processor(tiny_tokenizer(), "chatml", transform, num_visual_tokens=16)


def records() -> list[Record]:
    text = (Turn("user", "d"), Turn("assistant", "e"))
    one = (Turn("user", "<image>f"), Turn("assistant", "g"))
    return [Record("two", ROUNDS, (picture(0), picture(1))), Record("none", text), Record("one", one, (picture(2),))]


def tiled_batch(processor: Processor | None = None) -> VLMBatch:
    chosen = processor or processor_of("anyres")
    return pack([sample for record in records() for sample in chosen.encode(record)])


@pytest.fixture(params=["anyres_mlp2x_gelu", "anyres_pool_mlp2x_gelu"])
def vlm(request: pytest.FixtureRequest) -> VLM:
    return tiny_vlm(connector=request.param).eval()


def test_the_row_holds_every_image_as_the_reference_joins_it(vlm: VLM) -> None:
    batch = tiled_batch()
    inputs = vlm.embed(batch)
    tokens = vlm.connector(vlm.vision_encoder(batch.view(DEFAULT_VIEW)))
    newline = vlm.connector.image_newline
    first = 0
    starts = inputs.splice.text_positions[batch.input_ids < 0].tolist()
    for start, tiling in zip(starts, batch.tilings[DEFAULT_VIEW], strict=True):
        own = tokens[first : first + tiling.num_tiles]
        expected = joined(own, tiling.rows, tiling.columns, tiling.height, tiling.width, newline)
        torch.testing.assert_close(inputs.inputs_embeds[start : start + len(expected)], expected)
        assert (inputs.splice.segments[start : start + len(expected)] == Segment.IMAGE).all()
        assert inputs.splice.segments[start + len(expected)] != Segment.IMAGE
        first += tiling.num_tiles


def test_the_tokens_counted_on_the_host_are_those_of_the_row(vlm: VLM) -> None:
    batch = tiled_batch()
    output = vlm(batch)
    assert vlm.count_tokens(batch) == len(output.hidden_states) == sum(output.lengths)
    assert len(set(vlm.visual_token_counts(batch, batch.num_images, DEFAULT_VIEW))) == 3


@pytest.mark.parametrize("tiled", ["student", "teacher"])
def test_a_teacher_may_see_another_number_of_tokens(tiled: str) -> None:
    student = tiny_vlm(connector="anyres_mlp2x_gelu" if tiled == "student" else "mlp2x_gelu").eval()
    teacher = tiny_vlm(connector="anyres_mlp2x_gelu" if tiled == "teacher" else "mlp2x_gelu", seed=1).eval()
    mine, other = ("anyres", "pad") if tiled == "student" else ("pad", "anyres")
    batch = tiled_batch(processor_of(mine).with_view(TEACHER_VIEW, processor_of(other).image_transform))
    seen, taught = student(batch), teacher(batch, view=TEACHER_VIEW)
    assert len(seen.hidden_states) != len(taught.hidden_states)
    assert teacher.count_tokens(batch, TEACHER_VIEW) == len(taught.hidden_states)
    rows, targets = seen.prediction_rows(batch.labels)
    teacher_rows, same_targets = taught.prediction_rows(batch.labels)
    assert torch.equal(targets, same_targets)
    assert rows.shape == teacher_rows.shape
    alone = teacher(tiled_batch(processor_of(other)))
    torch.testing.assert_close(taught.hidden_states[teacher_rows], alone.hidden_states[teacher_rows])


def test_a_sample_does_not_depend_on_its_batch_mates(vlm: VLM) -> None:
    together = vlm(tiled_batch())
    ends = torch.tensor(together.lengths).cumsum(0).tolist()
    for row, record in enumerate(records()):
        alone = vlm(pack(processor_of("anyres").encode(record)))
        own = together.hidden_states[ends[row] - together.lengths[row] : ends[row]]
        torch.testing.assert_close(own, alone.hidden_states)


def test_generation_continues_tiled_prompts_as_without_a_cache() -> None:
    vlm = tiny_vlm(connector="anyres_mlp2x_gelu").eval()
    processor = processor_of("anyres")
    prompts = [processor.encode_prompt(record.turns[:1], record.images, key=record.key) for record in records()]
    answers = generate(vlm, prompts, max_new_tokens=4, eos_token_ids=(), batch_size=3)
    for prompt, answer in zip(prompts, answers):
        assert answer == _without_cache(vlm, prompt, 4)


@torch.no_grad()
def _without_cache(vlm: VLM, prompt: EncodedSample, num_tokens: int) -> list[int]:
    ids = prompt.input_ids
    for _ in range(num_tokens):
        filler = torch.full_like(ids, IGNORE_INDEX)
        batch = pack([dataclasses.replace(prompt, input_ids=ids, labels=filler, segments=torch.ones_like(ids))])
        token = vlm.head.logits(vlm(batch).hidden_states[-1:]).argmax()
        ids = torch.cat([ids, token[None]])
    return ids[-num_tokens:].tolist()


def test_every_parameter_takes_part_in_every_step() -> None:
    vlm = tiny_vlm(connector="anyres_mlp2x_gelu")
    text_only = pack(processor_of("anyres").encode(records()[1]))
    for batch, reaches in ((tiled_batch(), True), (tiled_batch(processor_of("pad")), False), (text_only, False)):
        vlm.zero_grad()
        vlm(batch).hidden_states.square().sum().backward()
        gradient = vlm.connector.image_newline.grad
        assert gradient is not None
        assert bool(gradient.abs().sum() > 0) == reaches


def test_tiles_need_a_connector_that_joins_them() -> None:
    with pytest.raises(ValueError, match=r"cannot join tiles; set model\.connector=anyres_mlp2x_gelu"):
        tiny_vlm()(tiled_batch())


def test_a_blind_model_reads_each_tiled_image_as_one_token() -> None:
    blind = tiny_vlm(vision=None)
    assert blind.count_tokens(tiled_batch()) == tiled_batch().num_text_tokens == len(blind(tiled_batch()).hidden_states)


def test_a_model_folder_keeps_the_newline(vlm: VLM, tmp_path: Path) -> None:
    save_pretrained(vlm, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(loaded(tiled_batch()).hidden_states, vlm(tiled_batch()).hidden_states)
