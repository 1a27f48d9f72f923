"""What one rank of `test_ranks.py` runs: every case takes two steps under DDP and under FSDP2.

The first rank writes the parameters after the steps, and what was logged, to FOLDER/<strategy>_<case>.pt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.tensor import DTensor

from lightning_modules.callbacks.routing_monitor import RoutingMonitor
from lightning_modules.instruction_tuning import InstructionTuning
from lightning_modules.router_losses import router_losses
from lightning_modules.strategies import ShardedStrategy
from moevlm.ops.routing import top_k_routing
from tests.lightning_modules.runs import (
    RANK_CASES,
    build_dense,
    fit,
    make_batch,
    make_stage,
    rank_logits,
    rank_steps,
    selection_biases,
    sgd,
)

TAUGHT = ("mimic_distillation", "replicated_teacher", "offloaded_teacher_of_the_same_vision")


def run_rank(rank: int, port: int, folder: Path) -> None:
    """Run all cases; DDP first, since FSDP2 shards in place."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    for kind in ("ddp", "fsdp"):
        for name in RANK_CASES:
            stage = make_stage(name, optimizer=sgd)
            callbacks = [RoutingMonitor()]
            trainer = fit(stage, rank_steps(rank, name), strategy=_strategy(kind), devices=2, callbacks=callbacks)
            _save(folder / f"{kind}_{name}.pt", stage.model, trainer.callback_metrics, rank)
            if name in TAUGHT:
                _teacher(folder / f"teacher_{kind}_{name}.pt", stage, trainer, rank)
    _checkpoints(folder, rank)
    _balance(folder / f"balance_{rank}.pt", rank)
    try:
        fit(_LoneParameter(build_dense, sgd), rank_steps(rank), strategy=_strategy("fsdp"), devices=2)
    except ValueError as error:
        (folder / f"refused_{rank}.txt").write_text(str(error))


class _LoneParameter(InstructionTuning):
    """A stage with a parameter that nobody shards."""

    def configure_model(self) -> None:
        super().configure_model()
        self.scale = torch.nn.Parameter(torch.ones(()))


def _teacher(path: Path, stage: Any, trainer: Any, rank: int) -> None:
    """What a step leaves on the teacher, and what of it is in the optimizer and the checkpoint."""
    saved = trainer.strategy.lightning_module_state_dict()
    trained = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    parameters = dict(stage.teacher.named_parameters())
    found = {
        "gradients": [key for key, value in parameters.items() if value.grad is not None or value.requires_grad],
        "in_optimizer": [key for key, value in parameters.items() if id(value) in trained],
        "in_state": [key for key in saved if not key.startswith("model.")],
        "trained": sorted(key for key, value in stage.model.named_parameters() if id(value) in trained),
        "training": stage.teacher.training,
        "sharded": any(isinstance(value, DTensor) for value in parameters.values()),
        "shares_vision": stage.frozen["teacher"].shares_vision,
    }
    if rank == 0:
        torch.save(found, path)


def _balance(path: Path, rank: int) -> None:
    """The balance loss with the load of both ranks, on this rank's tokens; its gradient."""
    logits = rank_logits(rank).requires_grad_()
    routing = top_k_routing(logits, top_k=2)
    (loss,) = router_losses({3: routing}, ["load_balancing"], over_ranks=True).values()
    loss.sum.backward()
    torch.save({"sum": loss.sum.detach(), "count": loss.count, "gradient": logits.grad}, path)


def _checkpoints(folder: Path, rank: int) -> None:
    """FSDP2: stop after one step, publish over an older checkpoint, go on; write the model folder."""
    steps, name = rank_steps(rank, ""), "mimic_distillation"
    path = folder / "sharded.ckpt"
    trainer = fit(make_stage(name), steps, max_steps=1, strategy=_strategy("fsdp"), devices=2)
    if rank == 0:
        path.mkdir()
        (path / "__9_0.distcp").write_text("of an older checkpoint")
    trainer.strategy.barrier()
    trainer.save_checkpoint(path)
    stage = make_stage(name)
    resumed = fit(stage, steps, done=1, ckpt_path=path, strategy=_strategy("fsdp"), devices=2, val=[make_batch(3)])
    _save(folder / "resumed.pt", stage.model, resumed.callback_metrics, rank)
    stage.save_model(folder / "model")
    unbroken = make_stage(name)
    fit(unbroken, steps, strategy=_strategy("fsdp"), devices=2)
    _save(folder / "unbroken.pt", unbroken.model, {}, rank)


def _strategy(kind: str) -> Any:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
    return ShardedStrategy(process_group_backend="gloo")


def _save(path: Path, model: torch.nn.Module, metrics: Mapping[str, Any], rank: int) -> None:
    parameters = {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }
    if rank == 0:
        logged = {key: float(value) for key, value in metrics.items()}
        torch.save({"parameters": parameters, "logged": logged, "biases": selection_biases(model)}, path)
