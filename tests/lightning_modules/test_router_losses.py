"""The routers' losses and biases within one process; test_ranks.py has several."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.moe_tuning import MoETuning
from lightning_modules.router_losses import router_losses
from moevlm.models.vlm import VLM
from moevlm.ops.deepspeed import deepspeed_routing
from moevlm.ops.routing import top_k_routing
from tests.lightning_modules.runs import adamw, build_sparse, fit, make_batch, parameters_of, selection_biases


def router_gradients(*coefficients: float, backend: str | None = None, **options: Any) -> list[Tensor]:
    """The gradient of the first router after one objective, with the balance loss weighted by each coefficient."""
    vlm: VLM = build_sparse(**options).train()
    stage = MoETuning(lambda: vlm, adamw)
    stage.model = vlm if backend is None else Compiled(vlm, backend)  # type: ignore[assignment]
    gradients = []
    for coefficient in coefficients:
        losses = stage.compute_losses(make_batch()).losses
        vlm.zero_grad()
        (losses["lm"].sum + coefficient * losses["load_balancing"].sum).backward()
        gradient = vlm.moe_layers[0].router.weight.grad
        assert gradient is not None
        gradients.append(gradient)
    assert backend is None or stage.model.num_graphs > 0
    return gradients


class Compiled:
    """A model whose forward pass is compiled, and that counts the graphs."""

    def __init__(self, vlm: VLM, backend: str) -> None:
        self.head, self.num_graphs = vlm.head, 0
        compile_graph = torch._dynamo.lookup_backend(backend)

        def count(graph: Any, inputs: Any) -> Any:
            self.num_graphs += 1
            return compile_graph(graph, inputs)

        torch._dynamo.reset()
        self.forward = torch.compile(vlm, backend=count)

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


COMPILED = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_routers_gradient_changes_with_the_coefficient(gradient_checkpointing: bool) -> None:
    without, strong = found = router_gradients(0.0, 10.0, gradient_checkpointing=gradient_checkpointing)
    assert (strong - without).norm() > 0.1 * without.norm() > 0
    torch.testing.assert_close(found, router_gradients(0.0, 10.0))


@pytest.mark.untraced  # tracing doubles the time of compiling
@pytest.mark.parametrize("backend", COMPILED)
def test_the_same_holds_for_a_compiled_model(backend: str) -> None:
    without, strong = found = router_gradients(0.0, 10.0, backend=backend, gradient_checkpointing=True)
    torch.testing.assert_close(found, router_gradients(0.0, 10.0))
    assert (strong - without).norm() > 0.1 * without.norm() > 0


def test_a_sum_over_layers_is_what_deepspeed_adds_up_of_first_choices() -> None:
    logits = [torch.randn(12, 4), torch.randn(12, 4)]
    routings = {
        layer: deepspeed_routing(values, top_k=2, capacity=None) for layer, values in zip((0, 2), logits, strict=True)
    }
    found = router_losses(routings, ["load_balancing"], over_layers="sum")["load_balancing"]
    expected = 0.0
    for values in logits:
        probs = values.softmax(dim=-1)
        first = torch.nn.functional.one_hot(probs.argmax(dim=-1), 4).float()
        expected += float((probs.mean(0) * first.mean(0)).mean() * 16)  # mean_e(me * ce) * E^2
    assert float(found.sum) == pytest.approx(12 * expected, rel=1e-5)
    both = router_losses({0: top_k_routing(logits[0], top_k=2)}, ["load_balancing"])["load_balancing"]
    first_only = router_losses({0: routings[0]}, ["load_balancing"])["load_balancing"]
    assert float(both.sum) != pytest.approx(float(first_only.sum), rel=1e-3)


def test_an_unknown_reduction_is_refused_when_the_stage_is_built() -> None:
    with pytest.raises(ValueError, match="unknown router_losses_over_layers 'max'; known: mean, sum"):
        MoETuning(build_sparse, adamw, router_losses_over_layers="max")


BIASED = {"bias_update_rate": 0.02, "placement": "all"}


def test_a_selection_bias_lowers_the_most_loaded_expert_and_raises_the_least() -> None:
    stage = MoETuning(partial(build_sparse, moe=BIASED), adamw, loss_weights={"load_balancing": 0.0})
    trainer = fit(stage, [make_batch()])
    assert trainer.global_step == 1
    before = build_sparse(moe=BIASED)(make_batch()).routings
    for layer, routing in before.items():
        counts = torch.bincount(routing.expert_ids.flatten(), minlength=4).float()
        bias = stage.model.moe_layers[layer].router.selection_bias
        assert bias is not None
        torch.testing.assert_close(bias, 0.02 * torch.sign(counts.mean() - counts))


def test_selection_biases_resume_with_the_run(tmp_path: Path) -> None:
    build = partial(build_sparse, moe=BIASED)
    steps = [make_batch(seed) for seed in range(3)]
    unbroken = MoETuning(build, adamw)
    fit(unbroken, steps)
    trainer = fit(MoETuning(build, adamw), steps, max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed = MoETuning(build, adamw)
    fit(resumed, steps, done=2, ckpt_path=tmp_path / "two.ckpt")
    found, expected = ({**parameters_of(stage), **selection_biases(stage.model)} for stage in (resumed, unbroken))
    assert len(selection_biases(resumed.model)) == 2
    assert all(torch.equal(found[name], value) for name, value in expected.items())
