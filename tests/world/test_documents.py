import random

import pytest

from moevlm.world.documents import (
    NOTHING_THERE,
    list_objects,
    patch_words,
    pretraining_conversation,
    pretraining_document,
    text_only_conversation,
    text_only_document,
)
from moevlm.world.ground_truth import categories, mentioned_categories
from moevlm.world.scenes import Scene, iterate_scenes
from moevlm.world.texts.questions import AnswerBalancer
from moevlm.world.texts.visual_questions import KINDS, draw_question
from moevlm.world.texts.wording import label_phrase


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(iterate_scenes("train", 2, 100))


def test_the_first_user_turn_tells_the_whole_scene(scenes):
    for scene in scenes:
        told = pretraining_conversation(scene, random.Random(0))[0][0].rsplit("\n", 1)[0]
        assert mentioned_categories(told) == categories(scene)
        for item in scene.objects:
            assert all(word in told for word in (item.colour, item.size, item.texture, item.place, item.label or ""))


def test_nothing_is_asked_that_a_description_does_not_tell(scenes):
    rng, balancer = random.Random(0), AnswerBalancer()
    drawn = [draw_question(s, kind, rng, balancer, from_description=True) for s in scenes for kind in KINDS]
    assert "nearest" not in {q.form for q in drawn if q is not None}


def test_documents_are_the_conversations_in_plain_text(scenes):
    for scene in scenes[:10]:
        turns = pretraining_conversation(scene, random.Random(5))
        assert pretraining_document(scene, random.Random(5)) == "\n".join("\n".join(turn) for turn in turns)
    assert text_only_document(random.Random(1)).count("\n") == 2 * len(text_only_conversation(random.Random(1))) - 1


def test_conversations_have_several_answered_turns(scenes):
    lengths = [len(pretraining_conversation(s, random.Random(i))) for i, s in enumerate(scenes)]
    assert sum(lengths) / len(lengths) > 3
    assert all(answer for i, s in enumerate(scenes) for _, answer in pretraining_conversation(s, random.Random(i)))


def test_notes_have_a_line_per_object(scenes):
    assert all(len(list_objects(s).splitlines()) == len(s.objects) for s in scenes)


def test_no_questions_are_refused(scenes):
    with pytest.raises(ValueError, match="num_questions must be at least 1"):
        pretraining_conversation(scenes[0], random.Random(0), num_questions=0)


def test_a_picture_is_told_patch_by_patch(scenes: list[Scene]) -> None:
    for scene in scenes[:20]:
        words = patch_words(scene, 6)
        assert len(words) == 36
        told = [text for text in words if text != NOTHING_THERE]
        for item in scene.objects:
            label = [] if item.label is None else [label_phrase(item.label)]
            assert " ".join([item.category, item.colour, item.size, item.texture, *label]) in told
        assert NOTHING_THERE in words


def test_a_shown_scene_is_told_in_no_other_way(scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes[:30]):
        first = pretraining_conversation(scene, random.Random(number), picture="<image>")[0][0]
        assert first.startswith("<image>\n")
        assert first.count("\n") == 1
