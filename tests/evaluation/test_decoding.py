"""Every way to decode gives the answers of the plain one: the cache that grows, step by step."""

from typing import Any

import pytest
import torch

from moevlm.evaluation.decoding import CAPTURED_FAMILIES, Facts, automatic_decoding, choose_decoding, gather_facts
from moevlm.evaluation.generation import generate
from moevlm.models.adapter_settings import LoRASettings
from moevlm.models.adapters import add_lora
from moevlm.models.moe.router import random_routing
from moevlm.models.vlm import VLM
from tests.evaluation.test_generation import make_prompts
from tests.families import FAMILIES, family_config
from tests.tiny import tiny_decoder_config, tiny_vlm

MOE = {"num_experts": 4, "top_k": 2, "router_init_std": 1.0}
FUSED = {
    "qwen2": {"num_key_value_heads": 4},
    "qwen2_window": {},
    "qwen3": {"attention_bias": True},
    "mistral": {},
    "llama": {"mlp_bias": False},
}
ROUTINGS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"score": "sigmoid", "bias_update_rate": 0.1},
    {"normalise_weights": False, "weight_scale": 1.5},
]


def lively(language_model: dict[str, Any], **options: Any) -> VLM:
    """A model whose answers differ and do not repeat one token for ever."""
    vlm = tiny_vlm(language_model=language_model, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in [*vlm.named_parameters(), *vlm.named_buffers()]:
            if parameter.dim() > 1 or "bias" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return vlm


def answers(vlm: VLM, decoding: str, *, batch_size: int = 3, ends: tuple[int, ...] = ()) -> list[list[int]]:
    """Of seven prompts of six lengths: three batches, the last one smaller."""
    options: dict[str, Any] = {"max_new_tokens": 9, "batch_size": batch_size, "eos_token_ids": ends}
    return generate(vlm, make_prompts(), decoding=decoding, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_how_the_cache_is_kept(family: str) -> None:
    vlm = lively(family_config(family), moe=MOE)
    expected = answers(vlm, "dynamic")
    assert len({tuple(answer) for answer in expected}) > 3
    assert answers(vlm, "eager") == expected
    assert answers(vlm, "graph") == expected
    assert answers(vlm, "eager", batch_size=1) == expected  # nothing is padded: no mask, every row is real


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("family", FUSED)
def test_fused_steps_answer_as_the_models_own_layers(family: str, is_sparse: bool) -> None:
    vlm = lively(family_config(family, head_dim=16, **FUSED[family]), moe=MOE if is_sparse else None)
    expected = answers(vlm, "dynamic")
    assert answers(vlm, "fused") == expected
    assert answers(vlm, "fused", batch_size=1) == expected


@pytest.mark.parametrize("routing", ROUTINGS)
def test_captured_steps_route_as_the_models_own_layers(routing: dict[str, Any]) -> None:
    vlm = lively(tiny_decoder_config(head_dim=16), moe={**MOE, **routing})
    expected = answers(vlm, "dynamic")
    assert answers(vlm, "fused") == expected
    assert answers(vlm, "graph") == expected


@pytest.mark.parametrize(
    "options", [{"shared_expert": "full"}, {"residual": True}, {"shared_expert": "partition", "shared_fraction": 0.5}]
)
def test_captured_steps_keep_what_every_token_sees(options: dict[str, Any]) -> None:
    vlm = lively(tiny_decoder_config(), moe={**MOE, **options})
    assert answers(vlm, "graph") == answers(vlm, "dynamic")


@pytest.mark.parametrize("decoding", ["eager", "graph", "fused"])
def test_an_answer_that_ended_leaves_the_others_alone(decoding: str) -> None:
    vlm = lively(tiny_decoder_config(head_dim=16), moe=MOE)
    free = answers(vlm, "dynamic", batch_size=7)
    ends = (free[0][4], free[1][6], free[2][5])
    stopped = answers(vlm, decoding, batch_size=7, ends=ends)
    assert stopped == [
        answer[: min((answer.index(end) for end in ends if end in answer), default=9)] for answer in free
    ]
    assert len({len(answer) for answer in stopped}) > 2


def test_what_cannot_be_captured_is_refused_by_name_and_decoded_eagerly_by_default() -> None:
    capacity = tiny_vlm({**MOE, "policy": "deepspeed", "capacity_factor": 1.5}).eval()
    adapted = tiny_vlm(language_model=tiny_decoder_config(head_dim=16)).eval()
    add_lora(adapted, LoRASettings(rank=2))
    gemma = tiny_vlm(language_model=tiny_decoder_config("gemma2")).eval()
    for vlm, decoding, reason in [
        (capacity, "graph", "drops tokens"),
        (adapted, "fused", "adapters"),
        (gemma, "fused", "gemma2 is none of"),
        (tiny_vlm().eval(), "fused", "heads of width 8"),
        (gemma, "warp", "must be one of auto, fused"),
    ]:
        with pytest.raises(ValueError, match=reason):
            choose_decoding(vlm, decoding, 1)
        assert choose_decoding(vlm, "auto", 1) == "eager"
    sparse = tiny_vlm(MOE).eval()
    assert choose_decoding(sparse, "graph", 1) == "graph"
    with random_routing(sparse), pytest.raises(ValueError, match="routes at random"):
        choose_decoding(sparse, "graph", 1)


def on_a_gpu(vlm: VLM, batch_size: int = 1) -> Facts:
    """What would be known of the model there."""
    return gather_facts(vlm, batch_size)._replace(is_cuda=True, has_kernels=True)


def fusable(**options: Any) -> VLM:
    """Of a family, in a dtype and with heads that fused steps take; routers stay float32."""
    vlm = tiny_vlm(language_model=tiny_decoder_config(head_dim=16), **options).eval()
    for name, parameter in vlm.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "router" in name else torch.bfloat16)
    return vlm


@pytest.mark.parametrize("moe", [None, MOE])
def test_auto_takes_fused_steps_on_a_gpu_where_they_were_measured(moe: dict[str, Any] | None) -> None:
    vlm = fusable(moe=moe)
    assert automatic_decoding(on_a_gpu(vlm, 64)) == "fused"
    assert automatic_decoding(on_a_gpu(vlm, 65)) == "graph"
    assert automatic_decoding(on_a_gpu(vlm.float())) == "graph"


def test_auto_goes_back_step_by_step_and_refuses_nothing() -> None:
    fits = on_a_gpu(fusable())
    assert automatic_decoding(fits._replace(has_kernels=False)) == "graph"
    assert automatic_decoding(fits._replace(is_compiled=True)) == "fused"
    assert automatic_decoding(fits._replace(is_compiled=True, has_kernels=False)) == "eager"
    assert automatic_decoding(fits._replace(is_autocast=True)) == "eager"
    assert automatic_decoding(fits._replace(is_cuda=False)) == "eager"
    gemma = on_a_gpu(tiny_vlm(language_model=tiny_decoder_config("gemma2")).eval())
    assert automatic_decoding(gemma) == "graph"
    assert automatic_decoding(gemma._replace(family="unheard")) == "eager"
    drops = {**MOE, "policy": "deepspeed", "capacity_factor": 1.5}
    assert automatic_decoding(on_a_gpu(fusable(moe=drops))) == "eager"
    sparse = fusable(moe=MOE)
    with random_routing(sparse):
        assert automatic_decoding(on_a_gpu(sparse)) == "eager"


def test_facts_are_those_of_the_model_and_its_place() -> None:
    vlm = fusable()
    found = gather_facts(vlm, 1)
    assert (found.is_cuda, found.has_kernels, found.is_autocast, found.is_compiled) == (False, False, False, False)
    assert (found.dtype, found.family) == (torch.bfloat16, "qwen2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gather_facts(vlm, 1).is_autocast
    vlm.decoder_blocks[0].compile()  # marks the layer; nothing is compiled before its first call
    assert gather_facts(vlm, 1).is_compiled


def test_auto_captures_the_families_that_a_test_captures_on_a_gpu() -> None:
    assert set(CAPTURED_FAMILIES) == {family_config(family)["model_type"] for family in FAMILIES}


@pytest.mark.gpu
@pytest.mark.parametrize("decoding", ["eager", "graph", "fused"])
@pytest.mark.parametrize("family", FUSED)
def test_captured_answers_equal_the_plain_ones_on_a_gpu(family: str, decoding: str) -> None:
    vlm = lively(family_config(family, head_dim=16, **FUSED[family]), moe=MOE).cuda()
    expected = answers(vlm, "dynamic")
    assert answers(vlm, decoding) == expected
    assert answers(vlm, decoding, batch_size=1) == expected
    assert answers(vlm, decoding, batch_size=7) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_captured_on_a_gpu(family: str) -> None:
    vlm = lively(family_config(family), moe=MOE).cuda()
    assert answers(vlm, "graph") == answers(vlm, "dynamic")
