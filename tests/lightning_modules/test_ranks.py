"""Two processes take the same step as one: every stage, under DDP and under FSDP2. One pair runs all cases."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from lightning_modules.callbacks.routing_monitor import RoutingMonitor
from lightning_modules.router_losses import router_losses
from lightning_modules.strategies import consolidate
from moevlm.models.pretrained import load_pretrained
from moevlm.ops.routing import top_k_routing
from tests.lightning_modules.rank_worker import run_rank
from tests.lightning_modules.runs import (
    RANK_CASES,
    build_adversarial,
    fit,
    initial_parameters,
    make_alone,
    parameters_of,
    rank_logits,
    rank_steps,
    selection_biases,
)

pytestmark = pytest.mark.timeout(600)  # several cases more than a minute on two busy cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    method = "spawn" if torch.cuda.is_available() else "fork"  # a fork need not import everything again
    mp.start_processes(run_rank, args=(port, folder), nprocs=2, daemon=True, start_method=method)
    return folder


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    """Each case in this process, on the micro-batches of both ranks."""
    results = {}
    for name in RANK_CASES:
        stage = make_alone(name)
        trainer = fit(stage, rank_steps(None, name), callbacks=[RoutingMonitor()])
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
        results[name] = {
            "parameters": parameters_of(stage),
            "logged": logged,
            "biases": selection_biases(stage.model),
        }
    return results


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", list(RANK_CASES))
def test_two_ranks_take_the_same_steps_as_one_process(
    name: str, strategy: str, folder: Path, single: dict[str, dict[str, Any]]
) -> None:
    found, start = torch.load(folder / f"{strategy}_{name}.pt"), initial_parameters(name)
    steps = {key: expected - start[key] for key, expected in single[name]["parameters"].items()}
    moved = max(step.abs().max().item() for step in steps.values())
    assert moved > 1e-4
    for key, step in steps.items():
        difference = (found["parameters"][key] - start[key] - step).abs().max().item()
        assert difference < 1e-3 * moved, f"{key} is {difference} off after steps of {moved}"
    assert found["logged"] == pytest.approx(single[name]["logged"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_loss_free_biases_move_by_the_counts_of_all_ranks(
    strategy: str, folder: Path, single: dict[str, dict[str, Any]]
) -> None:
    found = torch.load(folder / f"{strategy}_no_balance.pt")["biases"]
    expected = single["no_balance"]["biases"]
    assert len(found) == 1
    for name, bias in expected.items():
        assert bias.abs().max() > 0.005
        assert torch.equal(found[name].cpu(), bias), name


def test_a_balance_loss_over_ranks_is_that_of_all_tokens(folder: Path) -> None:
    ranks = [torch.load(folder / f"balance_{rank}.pt") for rank in (0, 1)]
    logits = torch.cat([rank_logits(rank) for rank in (0, 1)]).requires_grad_()
    (whole,) = router_losses({3: top_k_routing(logits, top_k=2)}, ["load_balancing"]).values()
    whole.sum.backward()
    assert sum(rank["count"] for rank in ranks) == whole.count
    torch.testing.assert_close(sum(rank["sum"] for rank in ranks), whole.sum.detach())
    torch.testing.assert_close(torch.cat([rank["gradient"] for rank in ranks]), logits.grad)
    alone = [
        router_losses({3: top_k_routing(rank_logits(rank), top_k=2)}, ["load_balancing"])["load_balancing"].sum
        for rank in (0, 1)
    ]
    assert abs(sum(alone) - whole.sum) > 0.1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_routers_step_changes_with_the_balance_coefficient(strategy: str, folder: Path) -> None:
    strong, none = (torch.load(folder / f"{strategy}_{name}.pt") for name in ("strong_balance", "no_balance"))
    routers = [name for name in strong["parameters"] if name.endswith("router.weight")]
    start = initial_parameters("strong_balance")
    assert routers
    for name in routers:
        step = none["parameters"][name] - start[name]
        change = strong["parameters"][name] - none["parameters"][name]
        assert change.norm() > 0.1 * step.norm(), name


def test_the_ranks_of_the_adversarial_case_use_other_experts() -> None:
    model = build_adversarial()
    for rank, expert in ((0, 0), (1, 1)):
        for batch in rank_steps(rank, "adversarial_routing")[0]:
            assert set(model(batch).routings[0].expert_ids.flatten().tolist()) == {expert}


def test_a_sharded_checkpoint_resumes_exactly(folder: Path) -> None:
    resumed, unbroken = (torch.load(folder / f"{name}.pt")["parameters"] for name in ("resumed", "unbroken"))
    assert resumed.keys() == unbroken.keys()
    for key, value in unbroken.items():
        assert torch.equal(resumed[key], value), key


def test_a_sharded_checkpoint_is_published_whole_and_consolidates_into_the_student_alone(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "sharded.ckpt").iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt",
    ]  # fmt: skip
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    checkpoint = consolidate(folder / "sharded.ckpt")
    names = {f"model.{name}" for name in initial_parameters("mimic_distillation")}
    found = set(checkpoint["state_dict"])
    assert names <= found
    assert all(name.startswith("model.") for name in found)
    assert checkpoint["global_step"] == 1
    assert len(checkpoint["optimizer_states"]) == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["mimic_distillation", "replicated_teacher", "offloaded_teacher_of_the_same_vision"])
def test_a_teacher_has_no_gradient_no_optimizer_state_and_no_place_in_a_checkpoint(
    name: str, strategy: str, folder: Path
) -> None:
    found = torch.load(folder / f"teacher_{strategy}_{name}.pt")
    assert found["gradients"] == found["in_optimizer"] == found["in_state"] == []
    assert found["trained"]
    assert not found["training"]
    assert found["sharded"] == (strategy == "fsdp" and name != "replicated_teacher")
    assert found["shares_vision"] == (name == "offloaded_teacher_of_the_same_vision")


def test_a_trainable_parameter_that_nobody_shards_is_refused(folder: Path) -> None:
    for rank in (0, 1):
        assert "parameter scale trains but is not sharded" in (folder / f"refused_{rank}.txt").read_text()


def test_the_model_folder_of_a_sharded_model_holds_its_full_weights(folder: Path) -> None:
    expected = torch.load(folder / "resumed.pt")["parameters"]
    for name, parameter in load_pretrained(folder / "model").named_parameters():
        assert torch.equal(parameter, expected[name]), name
