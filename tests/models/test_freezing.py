import pytest

from moevlm.models.freezing import format_trainable_table, freeze_except, trainable_table
from tests.tiny import tiny_decoder_config, tiny_vlm

MOE = {"num_experts": 2, "top_k": 1, "placement": [1]}


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["connector"], {"connector"}),
        (["vision_encoder"], {"vision_encoder"}),
        (["router"], {"language_model routers"}),
        (["experts", "router"], {"language_model experts", "language_model routers"}),
        (
            [r"language_model.*[.]mlp[.]"],
            {"language_model ffn", "language_model experts", "language_model routers"},
        ),
        (["lm_head"], {"language_model head"}),
        ([], set()),
    ],
)
def test_patterns_train_these_parts_and_no_other(patterns, expected):
    vlm = tiny_vlm(MOE, language_model=tiny_decoder_config(tie_word_embeddings=False))
    rows = trainable_table(freeze_except(vlm, patterns))
    assert {row.part for row in rows if row.trainable} == expected
    assert all(row.trainable in (0, row.total) for row in rows)


def test_freezing_again_forgets_what_was_trained_before():
    vlm = freeze_except(freeze_except(tiny_vlm(), ["language_model"]), ["connector"])
    assert all(name.startswith("connector.") for name in trainable_names(vlm))


def test_a_tied_head_answers_to_both_names():
    assert trainable_names(freeze_except(tiny_vlm(), ["lm_head"])) == {"language_model.model.embed_tokens.weight"}
    assert trainable_names(freeze_except(tiny_vlm(), ["embed_tokens"])) == {"language_model.model.embed_tokens.weight"}


def test_a_pattern_that_matches_nothing_is_refused_with_the_prefixes():
    with pytest.raises(
        ValueError, match=r"'projector' matches no parameter; .* connector.layers.N.*language_model.model"
    ):
        freeze_except(tiny_vlm(), ["connector", "projector"])


def test_a_broken_pattern_is_refused():
    with pytest.raises(ValueError, match="is no regular expression"):
        freeze_except(tiny_vlm(), ["connector("])


def test_the_table_counts_every_parameter_once():
    vlm = tiny_vlm(MOE)
    rows = trainable_table(vlm)
    assert sum(row.total for row in rows) == sum(parameter.numel() for parameter in vlm.parameters())
    assert [row.part for row in rows] == [
        "vision_encoder",
        "connector",
        "language_model routers",
        "language_model experts",
        "language_model norms",
        "language_model ffn",
        "language_model attention",
        "language_model embeddings",
    ]


@pytest.mark.parametrize("model_type", ["qwen2", "phi", "gemma2", "gpt_neox", "stablelm"])
def test_no_parameter_of_a_known_decoder_is_left_without_a_part(model_type):
    decoder = tiny_decoder_config(model_type, tie_word_embeddings=False, num_hidden_layers=2)
    parts = {row.part for row in trainable_table(tiny_vlm(MOE, language_model=decoder))}
    assert "language_model other" not in parts
    assert {"language_model head", "language_model embeddings", "language_model norms"} <= parts


def test_the_printed_table_ends_with_the_sum():
    table = format_trainable_table(trainable_table(freeze_except(tiny_vlm(), ["connector"])))
    assert table.splitlines()[-1].startswith("sum")
