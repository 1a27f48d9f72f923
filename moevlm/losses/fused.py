"""Cross-entropy and divergences on a GPU: three matrix products around two kernels, gradients made in the forward pass.

As `moevlm.losses.chunked`, with the passes over a chunk's logits fused (`moevlm.ops.vocabulary_kernels`) and the logits
kept in the dtype of the matrix product, bfloat16 as a rule; softmax and losses are in float32. A chunk's gradient is
written over its logits, so at most two (chunk x vocabulary) buffers exist, and the chunk is as large as `LOGITS_BYTES`
allows. The head's gradient is accumulated in the parameter's own dtype: float32 for a float32 parameter under autocast,
bfloat16 for a bfloat16 one (one rounding a chunk; each product sums in float32).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moevlm.batch import Head
from moevlm.losses.chunked import row_chunks
from moevlm.losses.divergences import Divergence
from moevlm.ops.products import add_product

if TYPE_CHECKING:
    from moevlm.ops.vocabulary_kernels import RowStatistics

KERNELS = ("auto", "fused", "plain")
"""auto is fused on a GPU with Triton, otherwise plain."""

LOGITS_BYTES = 896 * 2**20
"""Of the logits that exist at the same time, both models together, with the copies of heads that autocast makes: with
the gathered rows and their gradient within 1 GiB at 4,096 rows of 152k tokens."""

Weigh = Callable[["RowStatistics"], Tensor]
"""Statistics of a chunk -> [C] float32 weights of its rows' divergence."""


def is_fused(kernel: str, rows_RD: Tensor) -> bool:
    """Whether `kernel` means the fused path for these rows.

    Raises:
        ValueError: an unknown kernel, or "fused" where Triton cannot run.
    """
    check_kernel(kernel)
    possible = has_triton() and (rows_RD.is_cuda or (kernel == "fused" and _is_interpreted()))
    if kernel == "fused" and not possible:
        raise ValueError(
            f"loss_kernel=fused needs a GPU and Triton, the hidden states are on {rows_RD.device}; "
            "set stage.loss_kernel=auto"
        )
    return kernel != "plain" and possible and rows_RD.dtype in (torch.float32, torch.bfloat16, torch.float16)


def check_kernel(kernel: str) -> None:
    """Raise a ValueError for a kernel that is none of KERNELS."""
    if kernel not in KERNELS:
        raise ValueError(f"loss_kernel must be one of {KERNELS}, got {kernel!r}; set stage.loss_kernel")


def knows(divergence: Divergence) -> bool:
    """Whether the kernels compute this divergence."""
    return divergence.kind != "logit_mse" and not divergence.z_normed


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def fused_rows(
    hidden_RD: Tensor,
    head: Head,
    targets_R: Tensor | None,
    *,
    lm_weight: float,
    teacher_hidden_RD: Tensor | None = None,
    teacher_head: Head | None = None,
    kd_weight: float = 0.0,
    divergence: Divergence = Divergence(),  # noqa: B008  (frozen)
    weigh: Weigh | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, RowStatistics, Tensor, Tensor]:
    """``sum_r kd_weight * w_r D(p_r, q_r) + lm_weight * CE_r``, as `moevlm.losses.distillation.token_losses` has it.

    Args:
        hidden_RD: rows of the student; gradient.
        head: gradient, unless frozen.
        targets_R: needed for lm_weight != 0.
        teacher_hidden_RD: rows of the teacher over whose head's tokens, at most the student's, D runs.
        divergence: one that `knows`.
        weigh: w; None is 1.
        chunk_size: rows whose logits exist at the same time; None as many as `LOGITS_BYTES` allows.

    Returns:
        the scalar, which alone carries gradient (no second one: the first backward pass uses up what is stored); the
        rows' statistics at temperature 1; D [R]; w [R].
    """
    sides = [(hidden_RD, head)]
    if teacher_hidden_RD is not None and teacher_head is not None:
        sides.append((teacher_hidden_RD, teacher_head))
    size = _chunk_rows(sides) if chunk_size is None else chunk_size
    settings = _Settings(sides, targets_R, lm_weight, kd_weight, divergence, weigh, size, torch.is_grad_enabled())
    total, *found = _FusedRows.apply(hidden_RD, head.weight, head.bias, settings)
    from moevlm.ops.vocabulary_kernels import RowStatistics

    return total, RowStatistics(*found[:-2]), found[-2], found[-1]


class _Settings:
    """What is no input of the autograd function."""

    def __init__(
        self,
        sides: list[tuple[Tensor, Head]],
        targets_R: Tensor | None,
        lm_weight: float,
        kd_weight: float,
        divergence: Divergence,
        weigh: Weigh | None,
        chunk_size: int,
        grad_enabled: bool,
    ) -> None:
        self.sides, self.targets, self.lm_weight, self.kd_weight = sides, targets_R, lm_weight, kd_weight
        self.divergence = divergence
        self.weigh, self.chunk_size, self.grad_enabled = weigh, chunk_size, grad_enabled


class _FusedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, settings: _Settings
    ) -> tuple[Tensor, ...]:
        needs = [settings.grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        with _no_autocast(hidden_RD.device.type) as dtype:
            sides = [_Side(*side, settings.chunk_size, dtype) for side in settings.sides]
            grads = _Gradients(hidden_RD, weight_VD, bias_V, needs)
            total, columns = _run(sides, grads, settings)
        ctx.grads = grads
        ctx.mark_non_differentiable(*columns)
        return (total, *columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled where they lie: a copy of the head's would be as large as the head
        if grads is None:
            raise RuntimeError("a fused loss has one backward pass; set stage.loss_kernel=plain for more")
        from moevlm.ops.vocabulary_kernels import scale_in_place

        scaled = [None if grad is None else scale_in_place(grad, grad_outputs[0]) for grad in grads.tensors]
        return (*scaled, None)


class _Side:
    """One model's rows and head in the dtype of the products, and the buffer of its chunk's logits."""

    def __init__(self, hidden_RD: Tensor, head: Head, chunk_size: int, dtype: torch.dtype | None) -> None:
        from moevlm.ops.vocabulary_kernels import Squash

        dtype = head.weight.dtype if dtype is None else dtype
        self.hidden, self.weight = hidden_RD.detach().to(dtype), head.weight.detach().to(dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(dtype)
        self.squash = Squash(head.scale, head.softcap or 0.0)
        num_rows, num_columns = min(chunk_size, len(hidden_RD)), len(head.weight)
        width = -(-num_columns // 64) * 64  # rows of whole cache lines, whatever the vocabulary
        self.buffer = torch.empty(num_rows, width, dtype=dtype, device=hidden_RD.device)[:, :num_columns]

    def products(self, rows: slice) -> Tensor:
        """[C, V] ``h W^T + b`` in the buffer."""
        hidden_CD = self.hidden[rows]
        logits_CV = self.buffer[: len(hidden_CD)]
        if self.bias is None:
            return torch.mm(hidden_CD, self.weight.T, out=logits_CV)
        return torch.addmm(self.bias, hidden_CD, self.weight.T, out=logits_CV)


class _Gradients:
    """The gradients wanted, in the dtypes of their tensors."""

    def __init__(self, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: list[bool]) -> None:
        self.hidden = torch.empty_like(hidden_RD) if needs[0] else None
        has_rows = len(hidden_RD) > 0  # the first chunk writes, the others add
        self.weight = (torch.empty_like if has_rows else torch.zeros_like)(weight_VD) if needs[1] else None
        self.bias = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and needs[2] else None
        self.bias_dtype = None if bias_V is None else bias_V.dtype

    @property
    def any(self) -> bool:
        return self.hidden is not None or self.weight is not None or self.bias is not None

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.hidden, self.weight, None if self.bias is None else self.bias.to(self.bias_dtype)]

    def add(self, grad_CV: Tensor, side: _Side, rows: slice) -> None:
        """The products of a chunk's gradient of the logits."""
        if self.hidden is not None:
            if self.hidden.dtype == grad_CV.dtype:
                torch.mm(grad_CV, side.weight, out=self.hidden[rows])
            else:
                self.hidden[rows] = torch.mm(grad_CV, side.weight)
        if self.weight is not None:
            add_product(self.weight, grad_CV.T, side.hidden[rows], is_first=rows.start == 0)
        if self.bias is not None:
            self.bias += grad_CV.sum(dim=0, dtype=torch.float32)


def _run(sides: list[_Side], grads: _Gradients, settings: _Settings) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum, and [R] statistics and weights of all rows."""
    from moevlm.ops.vocabulary_kernels import RowStatistics, divergence_statistics, row_statistics, write_gradient

    student, teacher = sides[0], sides[1] if len(sides) > 1 else None
    device, num_rows = student.hidden.device, len(student.hidden)
    total = torch.zeros((), dtype=torch.float32, device=device)
    found: list[tuple[Tensor, ...]] = []
    for rows in row_chunks(num_rows, settings.chunk_size):
        targets_C = None if settings.targets is None else settings.targets[rows]
        logits_CV = student.products(rows)
        other: tuple[Any, ...] = () if teacher is None else (teacher.products(rows), teacher.squash)
        statistics = row_statistics(logits_CV, targets_C, student.squash, *other)
        weights_C = torch.ones_like(statistics.kl) if settings.weigh is None else settings.weigh(statistics)
        found_D, options = None, _options(settings.divergence)
        if other and not settings.divergence.is_plain_kl:
            found_D = divergence_statistics(logits_CV, student.squash, *other, **options, known=statistics)
        kd_C = statistics.kl if found_D is None else settings.divergence.temperature**2 * found_D.value
        total += settings.kd_weight * (weights_C * kd_C).sum()
        if targets_C is not None and settings.lm_weight:
            total -= settings.lm_weight * statistics.target.sum()
        if grads.any:
            other = (*other, settings.kd_weight * weights_C, found_D) if other else ()
            write_gradient(logits_CV, targets_C, student.squash, statistics, settings.lm_weight, *other, **options)
            grads.add(logits_CV, student, rows)
        found.append((*statistics, kd_C, weights_C))
    empty = (torch.zeros(0, device=device),) * (len(RowStatistics._fields) + 2)
    return total, [torch.cat(column) for column in zip(empty, *found)]


def _options(divergence: Divergence) -> dict[str, Any]:
    share = divergence.beta if divergence.kind == "jsd" else divergence.skew
    return {"kind": divergence.kind, "share": share, "temperature": divergence.temperature}


def _chunk_rows(sides: list[tuple[Tensor, Head]]) -> int:
    """As many rows as `LOGITS_BYTES` allows, or fewer for chunks of one size; a multiple of 128."""
    device_type = sides[0][0].device.type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    left, row_bytes = LOGITS_BYTES, 0
    for _, head in sides:
        size = (autocast or head.weight.dtype).itemsize
        row_bytes += size * len(head.weight)
        if autocast not in (None, head.weight.dtype):
            left -= size * head.weight.numel()
    most = max(128, left // row_bytes // 128 * 128)
    num_rows = len(sides[0][0])
    num_chunks = max(1, -(-num_rows // most))
    return max(128, -(-num_rows // num_chunks // 128) * 128)


@contextlib.contextmanager
def _no_autocast(device_type: str) -> Iterator[torch.dtype | None]:
    """Gives autocast's dtype, None outside of it, and lifts it: products write into buffers here."""
    is_on = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_on else None
    with torch.autocast(device_type, enabled=False):
        yield dtype


def _is_interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
