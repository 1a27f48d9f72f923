import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moevlm.models.counting import count_flops, rows_per_token, training_flops
from moevlm.models.freezing import format_trainable_table, freeze_except, sum_of_parts, trainable_table
from tests.families import FAMILIES, family_config
from tests.tiny import IMAGE_SIZE, tiny_batch, tiny_decoder_config, tiny_vlm

MOE = {"num_experts": 4, "top_k": 2, "placement": [0, 2]}
OPTIONS = {
    "dense": None,
    "sparse": MOE,
    "top_1": {**MOE, "top_k": 1},
    "other_counts": {**MOE, "num_experts": [2, 4]},
    "shared": {**MOE, "shared_expert": "partition", "shared_fraction": 0.25},
    "residual": {**MOE, "residual": True},
    "lora": {**MOE, "experts": "lora", "lora_rank": 3},
    "slices": {**MOE, "granularity": 2, "initialisation": "virtual_groups"},
}


def counted(function, kinds):
    """Operations of the named kinds that torch's own counter sees."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    found = counter.get_flop_counts()["Global"]
    return sum(number for operation, number in found.items() if str(operation).removeprefix("aten.") in kinds)


def decoder_flops(vlm, batch):
    return counted(lambda: vlm(batch), ("mm", "addmm"))


@pytest.mark.parametrize("name", OPTIONS)
def test_linear_maps_and_experts_are_what_torch_counts(name):
    vlm = tiny_vlm(OPTIONS[name], vision=None, language_model=tiny_decoder_config("phi")).eval()
    batch = tiny_batch(("sqqqaaaqqq",))
    flops = count_flops(vlm)
    expected = (flops.linear + flops.router + flops.experts) * batch.num_text_tokens
    assert decoder_flops(vlm, batch) == pytest.approx(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted(family):
    vlm = tiny_vlm({**MOE, "placement": "all"}, vision=None, language_model=family_config(family)).eval()
    batch = tiny_batch(("sqqqaaaqqq",))
    flops = count_flops(vlm)
    found = decoder_flops(vlm, batch) / batch.num_text_tokens
    assert found == pytest.approx(flops.linear + flops.router + flops.experts)


def test_an_image_is_what_torch_counts():
    vlm = tiny_vlm().eval()
    image = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    for block in vlm.vision_encoder.vit.blocks:
        block.attn.fused_attn = False  # the counter knows no fused attention on the CPU
    found = counted(lambda: vlm.connector(vlm.vision_encoder(image)), ("mm", "addmm", "bmm", "convolution"))
    assert found == pytest.approx(count_flops(vlm).image)


def test_the_head_is_what_torch_counts_for_a_row_of_logits():
    vlm = tiny_vlm()
    rows = torch.zeros(3, vlm.head.weight.shape[1])
    assert counted(lambda: vlm.head.logits(rows), ("mm",)) == 3 * count_flops(vlm).head


@pytest.mark.parametrize("window", [None, 4])
def test_attention_is_the_mean_over_what_each_token_sees(window):
    sliding = {} if window is None else {"sliding_window": window}
    vlm = tiny_vlm(language_model=tiny_decoder_config("mistral", **sliding))
    length = 10
    pairs = sum(min(token + 1, window or length) for token in range(length))
    config = vlm.language_model.config
    expected = 4 * config.num_attention_heads * config.head_dim * pairs / length * config.num_hidden_layers
    assert count_flops(vlm, sequence_length=length).attention == pytest.approx(expected)


def test_idle_rows_are_those_of_a_full_buffer():
    deepspeed = {"policy": "deepspeed", "capacity_factor": 1.5}
    plain, limited = (count_flops(tiny_vlm({**MOE, **options})) for options in ({}, deepspeed))
    assert plain.idle_experts == 0
    assert limited.token == plain.token
    assert limited.idle_experts == pytest.approx(0.5 * plain.experts)  # MoE-LLaVA: 3.0 rows are computed where 2 count
    assert rows_per_token(tiny_vlm({**MOE, **deepspeed}).moe_layers[0]) == 3.0


def test_a_token_meets_all_but_the_experts_it_is_not_sent_to():
    dense, sparse = (sum_of_parts(trainable_table(tiny_vlm(moe))) for moe in (None, MOE))
    one_expert = 3 * 32 * 48
    routers = 2 * 4 * 32
    assert dense.total == dense.activated
    assert sparse.total == dense.total + 2 * 3 * one_expert + routers
    assert sparse.activated == dense.total + 2 * 1 * one_expert + routers


def test_the_shared_base_of_lora_experts_is_met_by_every_token():
    vlm = tiny_vlm({**MOE, "experts": "lora", "lora_rank": 3})
    row = sum_of_parts(trainable_table(freeze_except(vlm, ["lora_"])))
    deltas = 3 * 3 * (32 + 48)  # three maps, rank 3
    assert row.total - row.activated == 2 * 2 * deltas
    assert row.trainable == 2 * 4 * deltas


def test_the_table_has_a_column_for_each_count():
    table = format_trainable_table(trainable_table(freeze_except(tiny_vlm(MOE), ["router"])))
    assert table.splitlines()[0].split() == ["part", "parameters", "activated", "trainable"]
    assert "language_model experts" in table


TRAINABLE = {
    "everything": [""],
    "decoder and connector": ["^connector", "^language_model"],
    "feed-forward": [r"^language_model\..*\.mlp\.", "^connector"],
    "connector": ["^connector"],
}


@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_a_training_step_is_what_torch_counts_forward_and_backward(trainable, moe):
    """Of the linear maps; fused attention on a CPU is not counted, so it is taken out by its formula."""
    decoder = tiny_decoder_config(tie_word_embeddings=False)
    vlm = freeze_except(tiny_vlm(moe, language_model=decoder), TRAINABLE[trainable])
    for block in vlm.vision_encoder.vit.blocks:
        block.attn.fused_attn = False
    batch = tiny_batch(("siqqaa", "sqqaaa", "iqaqa"))
    with FlopCounterMode(display=False) as counter:
        output = vlm(batch)
        rows, _ = output.prediction_rows(batch.labels)
        vlm.head.logits(output.hidden_states[rows]).sum().backward()
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    num_pairs = sum(length * (length + 1) / 2 for length in output.lengths)
    attention = 3 * 4 * vlm.language_model.config.hidden_size * num_pairs * vlm.language_model.config.num_hidden_layers
    expected = sum(flops for name, flops in found.items() if name.removeprefix("aten.") in KINDS)
    flops = training_flops(vlm, output.lengths, num_targets=batch.num_targets, num_images=batch.num_images)
    assert flops - attention == pytest.approx(expected)


KINDS = ("mm", "addmm", "bmm", "convolution", "convolution_backward")
