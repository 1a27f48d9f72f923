"""Who takes the steps of a routed layer: Triton kernels or plain PyTorch, by device."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moevlm.ops import plain_steps


@dataclass(frozen=True)
class Steps:
    """One implementation of the functions of `plain_steps`, which says what each computes."""

    sort_choices: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gather_rows: Callable[..., None]
    sum_rows: Callable[..., Tensor]
    swiglu: Callable[..., None]
    swiglu_backward: Callable[..., None]
    few_token_rows: Callable[..., Tensor]
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
    from moevlm.ops.kernels import few_tokens, router, rows, sorting, swiglu

    return _collect(few_tokens, router, rows, sorting, swiglu)


def has_kernels(tensor: Tensor) -> bool:
    """Whether kernels can run where this tensor is: a CUDA or ROCm device, and Triton installed."""
    return tensor.is_cuda and _is_installed()


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def steps_for(tensor: Tensor) -> Steps:
    """Kernels where they can run, else the plain steps."""
    return triton_steps() if has_kernels(tensor) else PLAIN
