"""How layers are run: what is kept for the backward pass, what is compiled. Neither changes what they compute.

Keeping everything is fastest and largest. "full" keeps a layer's input and runs the layer again in the backward pass
(Chen et al., arXiv:1604.06174), a third more work. "selective" keeps the outputs of matrix products and of attention as
well and runs only what is cheap again (Korthikanti et al., arXiv:2205.05198, for attention; here the other way round,
as attention without its scores is small and dear). A compiled layer chooses by itself what of the cheap it keeps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

POLICIES = ("off", "full", "selective")

KEPT_OPERATIONS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)
"""What "selective" does not run again."""


def checkpoint_policies(setting: bool | str | Sequence[str], num_layers: int) -> list[str]:
    """A policy for each layer; a list is repeated over the layers, true is "full".

    Raises:
        ValueError: an unknown policy, or an empty list.
    """
    if isinstance(setting, bool):
        setting = "full" if setting else "off"
    named = [setting] if isinstance(setting, str) else list(setting)
    unknown = [name for name in named if name not in POLICIES]
    if unknown or not named:
        raise ValueError(
            f"gradient_checkpointing must be true, false, one of {POLICIES} or a list of these, got {setting!r}; "
            "set model.gradient_checkpointing"
        )
    return list(itertools.islice(itertools.cycle(named), num_layers))


def checkpoint_function(policy: str) -> Any:
    """``torch.utils.checkpoint.checkpoint`` with the policy filled in.

    Only the non-reentrant kind lets a routing record keep its gradient.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_the_dear)
    return functools.partial(checkpoint, **options)


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compile each layer when it is first called; layers of one class share what was compiled.

    Numbers of tokens and sequences are symbols in the compiled code, so that another batch compiles nothing. A sparse
    feed-forward layer inside is left as it is.
    """
    for layer in layers:
        layer.compile(dynamic=True)


def _keep_the_dear(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name, _, overload = operation.name().partition(".")
    # what is written into a given tensor (the fused sparse layer's products) may be overwritten: it is run again
    is_kept = name in KEPT_OPERATIONS and overload != "out"
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
