"""Who takes the steps of a routed layer: Triton kernels or plain PyTorch, by device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moevlm.ops import plain_steps
from moevlm.ops.decode import has_kernels


@dataclass(frozen=True)
class Steps:
    """One implementation of the functions of `plain_steps`, which says what each computes."""

    choose: Callable[..., tuple[Tensor, Tensor, Tensor]]
    choose_backward: Callable[..., Tensor]
    sort_choices: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gather_rows: Callable[..., None]
    sum_rows: Callable[..., Tensor]
    swiglu: Callable[..., None]
    swiglu_backward: Callable[..., None]
    router_logits: Callable[..., Tensor]
    router_hidden_grad: Callable[..., Tensor]
    router_weight_grad: Callable[..., Tensor]


def _collect(*modules: Any) -> Steps:
    names = Steps.__dataclass_fields__
    return Steps(**{name: next(getattr(one, name) for one in modules if hasattr(one, name)) for name in names})


PLAIN = _collect(plain_steps)


@functools.cache
def triton_steps() -> Steps:
    """The kernels; imports Triton."""
    from moevlm.ops.kernels import choosing, router, rows, sorting, swiglu

    return _collect(choosing, router, rows, sorting, swiglu)


def steps_for(tensor: Tensor) -> Steps:
    """Kernels where they can run, else the plain steps."""
    return triton_steps() if has_kernels(tensor.device) else PLAIN
