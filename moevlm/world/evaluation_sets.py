"""Records to evaluate on: visual questions by kind, POPE-style probes, and descriptions to be checked."""

import random
from collections.abc import Sequence

from moevlm.world.cooccurrence import CoOccurrence
from moevlm.world.ground_truth import categories
from moevlm.world.records import Record, conversation_record
from moevlm.world.scenes import Scene
from moevlm.world.texts.conversations import follow_up_chain
from moevlm.world.texts.descriptions import describe
from moevlm.world.texts.phrasings import DESCRIPTION_REQUESTS
from moevlm.world.texts.probes import probe_questions, word_probe
from moevlm.world.texts.questions import PHRASING_SPLITS, AnswerBalancer, Question
from moevlm.world.texts.text_questions import draw_text_question, word_text
from moevlm.world.texts.visual_questions import VISUAL_KINDS, draw_question, word_visual
from moevlm.world.training_sets import ImagePath

MAX_PASSES = 6  # over the scenes, in search of enough different questions of a kind


def vqa_records(scenes: Sequence[Scene], seed: int, image_path: ImagePath, *, questions_per_kind: int) -> list[Record]:
    """Questions of every visual kind and text-only ones, as many of each kind, every second in a held-out phrasing.

    Where few scenes cannot serve that many different questions of a kind there are fewer.

    Raises:
        ValueError: questions_per_kind is less than 1.
    """
    if questions_per_kind < 1:
        raise ValueError(f"questions_per_kind must be at least 1, got {questions_per_kind}")
    records: list[Record] = []
    for kind in VISUAL_KINDS:
        records += _kind_records(kind, scenes, seed, image_path, questions_per_kind)
    rng, balancer = random.Random(f"vqa/{seed}/text"), AnswerBalancer()
    for number in range(questions_per_kind):
        question, phrasing = draw_text_question(rng, balancer), PHRASING_SPLITS[number % 2]
        turns = [(word_text(question, rng, phrasing=phrasing), question.answer)]
        records.append(
            conversation_record(f"vqa-text-{number:05d}", turns, kind="text", phrasing=phrasing, benchmark="vqa")
        )
    return records


def probe_records(
    scenes: Sequence[Scene], seed: int, image_path: ImagePath, *, negatives: str, prior: CoOccurrence
) -> list[Record]:
    """POPE-style probes of every scene; ``negatives`` is random, popular or adversarial."""
    records = []
    for scene in scenes:
        for number, question in enumerate(probe_questions(scene, negatives, prior, seed)):
            name, turns = f"{scene.scene_id}-pope-{negatives}-{number}", [(word_probe(question), question.answer)]
            records.append(
                conversation_record(name, turns, kind="existence", phrasing="train", image=image_path(scene),
                                    scene_id=scene.scene_id, benchmark=f"pope_{negatives}")
            )  # fmt: skip
    return records


def description_records(scenes: Sequence[Scene], seed: int, image_path: ImagePath) -> list[Record]:
    """One request for a long description a scene, with a reference and the categories that are there."""
    records = []
    for number, scene in enumerate(scenes):
        rng = random.Random(f"description/{seed}/{scene.scene_id}")
        phrasing = PHRASING_SPLITS[number % 2]
        turns = [(rng.choice(DESCRIPTION_REQUESTS[phrasing]), describe(scene, rng))]
        records.append(
            conversation_record(f"{scene.scene_id}-describe", turns, kind="description", phrasing=phrasing,
                                image=image_path(scene), scene_id=scene.scene_id, benchmark="description",
                                objects=categories(scene))
        )  # fmt: skip
    return records


def _kind_records(kind: str, scenes: Sequence[Scene], seed: int, image_path: ImagePath, count: int) -> list[Record]:
    rng, balancer = random.Random(f"vqa/{seed}/{kind}"), AnswerBalancer()
    records: list[Record] = []
    asked: set[tuple[str, str, str]] = set()
    for _ in range(MAX_PASSES):
        for scene in rng.sample(scenes, len(scenes)):
            if len(records) == count:
                return records
            turns = _questions(scene, kind, rng, balancer)
            key = (scene.scene_id, "/".join(q.form for q in turns), str([q.slots for q in turns]))
            if not turns or key in asked:
                continue
            asked.add(key)
            phrasing = PHRASING_SPLITS[len(records) % 2]
            worded = [(word_visual(q, rng, phrasing=phrasing), q.answer) for q in turns]
            name = f"{scene.scene_id}-vqa-{kind}-{len(records):05d}"
            records.append(
                conversation_record(name, worded, kind=kind, phrasing=phrasing, image=image_path(scene),
                                    scene_id=scene.scene_id, benchmark="vqa", form=turns[-1].form)
            )  # fmt: skip
    return records


def _questions(scene: Scene, kind: str, rng: random.Random, balancer: AnswerBalancer) -> list[Question]:
    if kind == "conversation":
        return follow_up_chain(scene, rng.randint(2, 3), rng, balancer)
    question = draw_question(scene, kind, rng, balancer)
    return [] if question is None else [question]
