"""Experts per domain: whole decoders, or the feed-forward networks of models that were trained apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moevlm.evaluation.generation import generate
from moevlm.evaluation.regenerate import sequences_of
from moevlm.models.merging import build_merged, build_modular
from moevlm.models.modular import ModularVLM
from moevlm.models.pretrained import load_pretrained, save_pretrained
from moevlm.models.vlm import VLM
from moevlm.preprocessing.collate import pack
from tests.tiny import tiny_batch, tiny_decoder_config, tiny_vlm


def dense() -> VLM:
    return tiny_vlm(language_model=tiny_decoder_config(num_hidden_layers=2)).eval()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models that differ in their feed-forward networks, and one that differs in its attention, too."""
    root, folders = tmp_path_factory.mktemp("experts"), []
    for number, pattern in enumerate(("mlp", "mlp", "layers")):
        vlm, generator = dense(), torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in vlm.language_model.named_parameters():
                if pattern in name:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        save_pretrained(vlm, root / str(number))
        folders.append(str(root / str(number)))
    return folders


def domains(batch: Any, *sources: int) -> Any:
    return dataclasses.replace(batch, sources=torch.tensor(sources))


def test_merged_whole_models_say_of_each_domain_what_its_expert_says(experts: list[str]) -> None:
    batch = domains(tiny_batch(("siqqaa", "sqqaaa", "iqaqa")), 2, 0, 2)
    vlm = build_modular(experts=experts)
    assert vlm.training
    found = vlm(batch)
    for row, expert in ((0, 2), (1, 0), (2, 2)):
        expected = load_pretrained(experts[expert])(batch.select([row])).hidden_states
        torch.testing.assert_close(found.hidden_states[found.sequence_ids == row], expected)


def test_without_labels_the_router_chooses_and_the_answer_does_not_matter(experts: list[str]) -> None:
    vlm = build_modular(experts=experts).eval()
    with torch.no_grad():
        vlm.domain_router.weight *= 100
    batch = tiny_batch(("siqqaa", "sqqaaa", "iqaqa", "sqqqqq"))
    found = vlm(batch)
    assert found.domain_logits is not None
    choices = found.domain_logits.argmax(dim=-1).tolist()
    assert len(set(choices)) > 1
    for row, choice in enumerate(choices):
        expected = load_pretrained(experts[choice])(batch.select([row])).hidden_states
        torch.testing.assert_close(found.hidden_states[found.sequence_ids == row], expected, rtol=1e-4, atol=1e-5)
    other = batch.input_ids.clone()
    other[3:6] = torch.tensor([7, 8, 9])  # the first answer and what follows it
    changed = vlm(dataclasses.replace(batch, input_ids=torch.where(batch.segments == 3, other, batch.input_ids)))
    torch.testing.assert_close(changed.domain_logits, found.domain_logits)


def test_the_attention_kernel_that_is_asked_for_reaches_the_experts(experts: list[str]) -> None:
    vlm, batch = build_modular(experts=experts), domains(tiny_batch(("siqqaa", "sqqaaa")), 1, 0)
    vlm.attention = "varlen"
    with pytest.raises(ValueError, match="attention=varlen needs a GPU"):
        vlm(batch)


def test_a_common_expert_is_averaged_with_the_chosen_one(experts: list[str]) -> None:
    batch = domains(tiny_batch(("siqqaa", "sqqaaa")), 1, 0)
    vlm = build_modular(experts=experts[:2], common=True)
    with torch.no_grad():
        for parameter in vlm.other_decoders[-1].parameters():
            parameter += 0.1
    found = vlm(batch)
    common = build_modular(experts=experts[:2])
    common.other_decoders[0].load_state_dict(vlm.other_decoders[-1].state_dict())
    alone = common(domains(batch, 1, 1)).hidden_states
    chosen = build_modular(experts=experts[:2])(batch).hidden_states
    torch.testing.assert_close(found.hidden_states, (alone + chosen) / 2)


def test_each_domain_moves_its_own_expert_and_what_is_shared() -> None:
    vlm = ModularVLM(dense(), num_experts=3).train()
    output = vlm(domains(tiny_batch(("siqqaa", "sqqaaa")), 1, 1))
    output.hidden_states.square().sum().backward()
    moved = {name.split(".layers")[0]: False for name, _ in vlm.named_parameters()}
    for name, parameter in vlm.named_parameters():
        assert parameter.grad is not None or name.startswith(("vision_encoder", "domain_router")), name
        moved[name.split(".layers")[0]] |= parameter.grad is not None and bool(parameter.grad.any())
    assert moved["other_decoders.0"]
    assert moved["language_model.model.embed_tokens.weight"]
    assert not moved["language_model.model"]
    assert not moved["other_decoders.1"]
    assert not moved["domain_router.weight"]


def greedy(vlm: VLM, batch: Any, row: int) -> list[int]:
    """By whole forward passes, one token after the other."""
    sample, tokens = sequences_of(batch)[row], []
    for _ in range(4):
        ids = torch.cat([sample.input_ids, torch.tensor(tokens, dtype=torch.int64)])
        labels = torch.full_like(ids, -100)
        segments = torch.cat([sample.segments, torch.full((len(tokens),), 3)])
        output = vlm(pack([dataclasses.replace(sample, input_ids=ids, labels=labels, segments=segments)]))
        tokens.append(int(vlm.head.logits(output.hidden_states[-1:]).argmax()))
    return tokens


@pytest.mark.parametrize("common", [False, True])
def test_generation_with_a_cache_follows_the_routed_experts(common: bool, experts: list[str]) -> None:
    vlm = build_modular(experts=experts, common=common).eval()
    with torch.no_grad():
        vlm.domain_router.weight *= 100
    batch = tiny_batch(("siqq", "sqqqq", "iqqqqqq"))
    answers = generate(vlm, sequences_of(batch), max_new_tokens=4, eos_token_ids=(), batch_size=3)
    assert answers == [greedy(vlm, batch, row) for row in range(3)]


def test_a_modular_model_is_saved_and_loaded_whole(experts: list[str], tmp_path: Path) -> None:
    vlm = build_modular(experts=experts, common=True)
    save_pretrained(vlm, tmp_path)
    for loaded in (load_pretrained(tmp_path), build_modular(weights=str(tmp_path)).eval()):
        assert isinstance(loaded, ModularVLM)
        batch = tiny_batch()
        assert torch.equal(loaded(batch).hidden_states, vlm.eval()(batch).hidden_states)
    assert vlm.other_decoders[0].get_input_embeddings() is not vlm.language_model.get_input_embeddings()
    names = [name for name, _ in vlm.named_parameters()]
    assert sum("embed_tokens" in name for name in names) == 1


def test_merged_networks_are_those_of_the_experts(experts: list[str]) -> None:
    vlm = build_merged(experts[:2], moe={"top_k": 1})
    assert list(vlm.moe_layers) == [0, 1]
    batch = tiny_batch()
    for number, folder in enumerate(experts[:2]):
        forced = build_merged(experts[:2], moe={"top_k": 1})
        for layer in forced.moe_layers.values():
            layer.router.register_forward_hook(lambda module, inputs, logits, e=number: _prefer(logits, e))
        torch.testing.assert_close(
            forced(batch).hidden_states, load_pretrained(folder)(batch).hidden_states, rtol=1e-4, atol=1e-5
        )


def _prefer(logits: Tensor, expert: int) -> Tensor:
    return logits * 0 + torch.nn.functional.one_hot(torch.tensor(expert), logits.shape[1]) * 10.0


def test_other_weights_are_equal_or_averaged_or_refused(experts: list[str]) -> None:
    mixed = [experts[0], experts[2]]
    with pytest.raises(ValueError, match=r"differ in \d+ weights that experts share.*model\.shared=mean"):
        build_merged(mixed)
    merged = build_merged(mixed, shared="mean")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    values = [dict(load_pretrained(folder).named_parameters())[name] for folder in mixed]
    torch.testing.assert_close(dict(merged.named_parameters())[name], (values[0] + values[1]) / 2)


def test_what_cannot_be_merged_is_refused(experts: list[str], tmp_path: Path) -> None:
    other = tiny_vlm(language_model=tiny_decoder_config(num_hidden_layers=2, intermediate_size=64))
    save_pretrained(other, tmp_path / "wide")
    apart = dense()
    with torch.no_grad():
        apart.connector.layers[0].weight += 1
    save_pretrained(apart, tmp_path / "connector")
    cases: list[tuple[Any, str]] = [
        (lambda: build_modular(), "either from model.base or from model.experts"),
        (lambda: build_modular(experts[0], num_experts=1), "at least 2 experts, got 1"),
        (lambda: build_modular(weights=experts[0]), "is no modular model"),
        (lambda: build_modular(experts=[experts[0], str(tmp_path / "connector")]), r"differ in 1 weights.*connector"),
        (lambda: build_merged([experts[0], str(tmp_path / "wide")]), "has another shape than the first expert"),
        (lambda: build_merged(experts[:1]), "at least 2 experts"),
    ]
    for build, message in cases:
        with pytest.raises(ValueError, match=message):
            build()
    vlm = build_modular(experts=experts[:2])
    with pytest.raises(ValueError, match="a sample of source 2, the model has 2 experts"):
        vlm(domains(tiny_batch(("sqqa",)), 2))
