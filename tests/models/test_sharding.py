"""FSDP2 on two gloo processes, without Lightning: one spawned pair runs every case."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

from moevlm.batch import VLMBatch, VLMOutput
from moevlm.losses.moe import load_balancing_loss
from moevlm.models.pretrained import save_pretrained
from moevlm.models.sharding import shard
from moevlm.models.vlm import VLM
from tests.tiny import save_tiny_vlm, tiny_batch, tiny_vlm

WORLD_SIZE = 2
MOE = {"num_experts": 4, "top_k": 1, "placement": [0, 2], "router_init_std": 1.0}
BATCHES = [tiny_batch(("siqa", "sqqaa"), seed=1), tiny_batch(("sqqaaa",), seed=2)]  # images on the first rank only
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "fused": {"moe": {**MOE, "kernel": "fused"}, "gradient_checkpointing": True},
    "three_experts": {"moe": {**MOE, "num_experts": 3}},
}


def adversarial_routing(vlm: VLM, rank: int) -> None:
    """Each rank sends all its tokens to one expert of its own."""
    for layer in vlm.moe_layers.values():
        bias = torch.zeros(layer.num_experts)
        bias[rank] = 50.0

        def prefer(module: Any, args: Any, found: Any, bias: torch.Tensor = bias) -> Any:
            return (found[0] + bias, found[1]) if isinstance(found, tuple) else found + bias  # fused: tokens, too

        layer.router.register_forward_hook(prefer)


def step_loss(vlm: VLM, output: VLMOutput, batch: VLMBatch) -> torch.Tensor:
    """A task loss through the head, and a balance loss."""
    rows, targets = output.prediction_rows(batch.labels)
    task = torch.nn.functional.cross_entropy(vlm.head.logits(output.hidden_states[rows]), targets)
    balance = [load_balancing_loss(routing.router_probs, routing.expert_ids) for routing in output.routings.values()]
    return task + torch.stack(balance).mean()


def build(options: dict[str, Any]) -> VLM:
    return tiny_vlm(**{"moe": MOE, **options})


def expected_gradients(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One process: the mean of both ranks' losses."""
    totals: dict[str, torch.Tensor] = {}
    for rank, batch in enumerate(BATCHES):
        vlm = build(options)
        adversarial_routing(vlm, rank)
        step_loss(vlm, vlm(batch), batch).backward()
        for name, parameter in vlm.named_parameters():
            assert parameter.grad is not None, name
            totals[name] = totals.get(name, 0) + parameter.grad / WORLD_SIZE
    return totals


def run_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("data_parallel",))
    results: dict[str, Any] = {}
    for name, options in CASES.items():
        vlm = shard(build(options), mesh["data_parallel"])
        adversarial_routing(vlm, rank)
        output = vlm(BATCHES[rank])
        step_loss(vlm, output, BATCHES[rank]).backward()
        results[name] = {key: parameter.grad.full_tensor() for key, parameter in vlm.named_parameters()}
        results[f"{name} sharded"] = all(isinstance(parameter, DTensor) for parameter in vlm.parameters())
    results["bfloat16"] = bfloat16_dtypes(mesh, rank)
    results["generation"] = generation_entry(mesh)
    save_pretrained(shard(tiny_vlm(MOE), mesh["data_parallel"]), Path(folder) / "sharded")
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()


def bfloat16_dtypes(mesh: Any, rank: int) -> dict[str, torch.dtype]:
    vlm = shard(tiny_vlm(MOE), mesh["data_parallel"], param_dtype="bfloat16")
    output = vlm(BATCHES[rank])
    step_loss(vlm, output, BATCHES[rank]).backward()
    router = vlm.moe_layers[0].router.weight
    return {
        "hidden": output.hidden_states.dtype,
        "logits": output.routings[0].router_logits.dtype,
        "router gradient": router.grad.dtype,
        "weight": next(vlm.connector.parameters()).dtype,
    }


def generation_entry(mesh: Any) -> torch.Tensor:
    """A teacher-like model, without gradient."""
    return decode_twice(shard(tiny_vlm(MOE).eval().requires_grad_(False), mesh["data_parallel"]))


@torch.no_grad()
def decode_twice(vlm: VLM) -> torch.Tensor:
    """Logits of a prompt's next token, and of the one after."""
    embeds = vlm.embed(BATCHES[0]).inputs_embeds[None, :5]
    cache = DynamicCache()
    options: dict[str, Any] = {"attention_mask": None, "past_key_values": cache, "token_mask": None}
    first = vlm.decode(embeds, position_ids=torch.arange(5)[None], **options)[0, -1:]
    token = vlm.head.logits(first).argmax(dim=-1)
    second = vlm.decode(vlm.embed_tokens(token)[None], position_ids=torch.tensor([[5]]), **options)[0]
    return vlm.head.logits(torch.cat([first, second]))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # forking saves the imports, most of the time; autograd's device threads do not survive it
    method = "spawn" if torch.cuda.is_available() else "fork"
    mp.start_processes(run_rank, args=(port, str(folder)), nprocs=WORLD_SIZE, start_method=method)
    return {**torch.load(folder / "results.pt"), "folder": folder}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_a_single_process_whatever_each_rank_routes(results, case):
    expected = expected_gradients(CASES[case])
    assert results[case].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            results[case][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: n + text
        )


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_sharded(results, case):
    assert results[f"{case} sharded"]


def test_bfloat16_computation_leaves_routers_and_stored_weights_in_float32(results):
    assert results["bfloat16"] == {
        "hidden": torch.bfloat16,
        "logits": torch.float32,
        "router gradient": torch.float32,
        "weight": torch.float32,
    }


def test_generation_enters_a_sharded_model_past_its_forward(results):
    torch.testing.assert_close(results["generation"], decode_twice(tiny_vlm(MOE).eval()))


def test_a_sharded_model_saves_the_same_folder(results):
    folder = results["folder"]
    save_tiny_vlm(folder / "whole", MOE)
    for name in ("config.json", "model.safetensors"):
        assert (folder / "sharded" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_without_a_mesh_nothing_changes():
    vlm = tiny_vlm()
    assert shard(vlm, None) is vlm
    assert not any(isinstance(parameter, DTensor) for parameter in vlm.parameters())
