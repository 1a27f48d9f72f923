import random

import pytest

from moevlm.world import vocabulary as v
from moevlm.world.cooccurrence import count_cooccurrence
from moevlm.world.ground_truth import categories, mentioned_categories, patch_labels
from moevlm.world.scenes import Scene, iterate_scenes
from moevlm.world.texts.descriptions import caption, describe, relation_sentences
from moevlm.world.texts.preferences import FLAW_SHARES, draw_description_pair


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(iterate_scenes("train", 9, 400))


def test_faithful_texts_mention_exactly_what_is_there(scenes):
    for scene in scenes:
        rng = random.Random(scene.scene_id)
        for text in (caption(scene, rng), describe(scene, rng)):
            assert mentioned_categories(text) == categories(scene), text


def test_relation_sentences_mention_only_what_is_there(scenes):
    for scene in scenes:
        text = " ".join(relation_sentences(scene, random.Random(1), 3, scene.objects))
        assert set(mentioned_categories(text)) <= set(categories(scene))


def test_both_sides_of_a_pair_have_as_many_sentences(scenes):
    prior, rng = count_cooccurrence(scenes), random.Random(3)
    counts = set()
    for scene in scenes:
        pair = draw_description_pair(scene, prior, rng)
        assert pair.chosen.count(".") == pair.rejected.count(".")
        assert pair.chosen != pair.rejected
        counts.add(pair.chosen.count(".") - 1 - len(scene.objects))
    assert counts == {0, 1, 2}


def test_a_mistaken_object_keeps_all_but_its_category(scenes):
    prior, rng = count_cooccurrence(scenes), random.Random(4)
    pairs = [draw_description_pair(scene, prior, rng) for scene in scenes]
    mistaken = [pair for pair in pairs if pair.flaw == "mistaken"]
    assert mistaken
    for pair in mistaken:
        chosen, rejected = pair.chosen.split(), pair.rejected.split()
        different = {word.strip(".") for a, b in zip(chosen, rejected, strict=True) if a != b for word in (a, b)}
        assert different - set(v.CATEGORIES) <= {"a", "an", "A", "An"}
        assert pair.hallucinated in different


def test_rejected_descriptions_mention_the_hallucinated_category(scenes):
    prior, rng = count_cooccurrence(scenes), random.Random(0)
    flaws = set()
    for scene in scenes:
        pair = draw_description_pair(scene, prior, rng)
        flaws.add(pair.flaw)
        assert mentioned_categories(pair.chosen) == categories(scene)
        extra = set(mentioned_categories(pair.rejected)) - set(categories(scene))
        assert extra == ({pair.hallucinated} if pair.hallucinated else set())
        assert pair.chosen != pair.rejected
    assert flaws == set(FLAW_SHARES)


def test_chosen_and_rejected_are_about_as_long(scenes):
    prior, rng = count_cooccurrence(scenes), random.Random(0)
    pairs = [draw_description_pair(scene, prior, rng) for scene in scenes]
    chosen, rejected = (sum(len(getattr(p, side).split()) for p in pairs) for side in ("chosen", "rejected"))
    assert 0.95 < chosen / rejected < 1.05


def test_hallucinations_follow_the_prior(scenes):
    prior, rng = count_cooccurrence(scenes), random.Random(0)
    pairs = [(scene, draw_description_pair(scene, prior, rng)) for scene in scenes]
    told = [(scene, pair.hallucinated) for scene, pair in pairs if pair.flaw == "swapped"]
    partner = sum(v.PARTNERS[h] in categories(scene) for scene, h in told) / len(told)
    assert partner > 0.25  # an even choice among the absent categories would give 0.09


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A crescent lies across the Crosses.", ["cross", "moon"]),
        ("Two stars, a STAR and rings; during spring", ["star", "ring"]),
        ("nothing here", []),
    ],
)
def test_mentions_are_whole_words_with_plurals_and_synonyms(text, expected):
    assert mentioned_categories(text) == expected


def test_label_words_are_no_categories():
    assert mentioned_categories(" ".join(v.LABELS)) == []


def test_texts_keep_their_length(scenes):
    rng = random.Random(3)
    assert max(len(caption(s, rng).split()) for s in scenes) <= 16
    assert max(len(describe(s, rng).split()) for s in scenes) <= 90


def test_an_empty_grid_is_refused(scenes):
    with pytest.raises(ValueError, match="grid must be at least 1"):
        patch_labels(scenes[0], 0)
