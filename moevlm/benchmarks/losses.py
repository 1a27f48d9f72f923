"""Suite `losses`: cross-entropy and distillation from given hidden states, beside their peers and over a floor.

The floor is the matrix products that no exact loss can do without, over the supervised rows: the student's head, its
gradient to the rows and, where it trains, to the head, and the teacher's head. "all logits" makes those of every token
and masks the losses (as LLaVA-MoD does), "supervised logits" gathers the rows first, "ours, plain" goes through them in
chunks of torch operations. Peak memory has the head's gradient in it where the head trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as dense_cross_entropy

from moevlm.batch import Head
from moevlm.benchmarks.harness import Case, Contender, Work
from moevlm.losses.chunked import sum_over_rows
from moevlm.losses.distillation import token_losses
from moevlm.losses.divergences import Divergence, kl
from moevlm.losses.fused import fused_rows, is_fused
from moevlm.losses.teacher_rows import HeadRows

CHUNK_SIZE = 256  # of the paths without a size of their own


@dataclass(frozen=True)
class Problem:
    """Sizes of one case; a quarter of the tokens is supervised."""

    name: str
    tokens: int
    loss: str  # "kd+ce", "kd" or "ce"
    vocabulary: int = 151_936
    width: int = 2048
    teacher_width: int = 4096
    frozen_head: bool = False
    divergence: str = "forward_kl"
    all_logits: bool = True

    @property
    def rows(self) -> int:
        return self.tokens // 4


SMALL: dict[str, Any] = {"vocabulary": 300, "width": 16, "teacher_width": 24}
PROBLEMS = {
    "full": (
        Problem("kd + ce, 8k", 8192, "kd+ce"),
        Problem("kd + ce, 8k, frozen head", 8192, "kd+ce", frozen_head=True),
        Problem("kd + ce, 16k", 16384, "kd+ce", all_logits=False),
        Problem("ce, 8k", 8192, "ce"),
        Problem("ce, 16k", 16384, "ce", all_logits=False),
        Problem("reverse kl, 8k", 8192, "kd", divergence="reverse_kl", all_logits=False),
    ),
    "tiny": (
        Problem("kd + ce", 64, "kd+ce", **SMALL),
        Problem("kd + ce, frozen head", 64, "kd+ce", frozen_head=True, **SMALL),
        Problem("ce", 64, "ce", **SMALL),
        Problem("reverse kl", 64, "kd", divergence="reverse_kl", **SMALL),
    ),
}


@dataclass
class Inputs:
    """Hidden states of all tokens, heads, and which rows are supervised."""

    student: Tensor  # [T, D]
    head: Head
    teacher: Tensor  # [T, D']
    teacher_head: Head
    targets: Tensor  # [T]
    is_supervised: Tensor  # [T] bool
    rows: Tensor  # [R]
    divergence: Divergence
    has_teacher: bool
    has_targets: bool


Loss = Callable[[Inputs], Tensor]
"""A mean over the supervised rows."""


def cases(*, size: str, device: torch.device) -> Iterator[Case]:
    """Forward and backward of every problem; bfloat16 on a GPU, float32 elsewhere."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for problem in PROBLEMS[size]:
        inputs = draw(problem, device, dtype)
        yield Case(
            problem.name,
            [Contender("matmul floor", partial(_floor, inputs, problem))]
            + [Contender(name, partial(_work, inputs, loss, problem)) for name, loss in peers(problem).items()],
            floor="matmul floor",
            reference=partial(_reference, inputs),
            tolerance=3e-2 if dtype == torch.bfloat16 else 1e-4,
            facts={**asdict(problem), "rows": problem.rows, "head_gradient_gib": _head_gradient_gib(inputs)},
        )


def peers(problem: Problem) -> dict[str, Loss]:
    """Who is measured, ours first."""
    found: dict[str, Loss] = {"ours": partial(ours, kernel="auto"), "ours, plain": partial(ours, kernel="plain")}
    found["supervised logits"] = supervised_logits
    if problem.all_logits:
        found["all logits"] = all_logits
    if problem.loss == "ce":
        found["liger linear ce"] = liger_cross_entropy
    elif problem.divergence == "forward_kl":
        found["liger linear jsd, beta 0, and linear ce"] = liger_kl
        found["liger chunked jsd"] = liger_chunked
    return found


def draw(problem: Problem, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random; every fourth token is supervised."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(std)

    tokens, vocabulary = problem.tokens, problem.vocabulary
    is_supervised_T = torch.arange(tokens, device=device) % 4 == 3
    weight_VD = normal(vocabulary, problem.width, std=problem.width**-0.5)
    return Inputs(
        normal(tokens, problem.width).requires_grad_(),
        Head(weight_VD.requires_grad_(not problem.frozen_head)),
        normal(tokens, problem.teacher_width),
        Head(normal(vocabulary, problem.teacher_width, std=problem.teacher_width**-0.5)),
        torch.randint(vocabulary, (tokens,), generator=generator, device=device),
        is_supervised_T,
        is_supervised_T.nonzero().squeeze(1),
        Divergence(problem.divergence),
        "kd" in problem.loss,
        "ce" in problem.loss,
    )


def ours(inputs: Inputs, *, kernel: str) -> Tensor:
    """This suite's, fused or in plain chunks."""
    rows_RD, targets_R = inputs.student[inputs.rows], inputs.targets[inputs.rows]
    if not inputs.has_teacher:
        if is_fused(kernel, rows_RD):
            return fused_rows(rows_RD, inputs.head, targets_R, lm_weight=1.0)[0] / len(targets_R)

        def chunk_loss(logits_CV: Tensor, rows: slice) -> Tensor:
            return dense_cross_entropy(logits_CV, targets_R[rows], reduction="sum")

        return sum_over_rows(rows_RD, inputs.head, chunk_loss, chunk_size=4 * CHUNK_SIZE) / len(targets_R)
    teacher = HeadRows(inputs.teacher[inputs.rows], inputs.teacher_head, len(inputs.head.weight))
    options = {"divergence": inputs.divergence, "lm_weight": float(inputs.has_targets), "kernel": kernel}
    return token_losses(rows_RD, inputs.head, teacher, targets_R, **options).joint / len(targets_R)  # type: ignore[arg-type]


def supervised_logits(inputs: Inputs) -> Tensor:
    """The supervised rows alone, all at once."""
    rows = inputs.rows
    return _row_losses(inputs.student[rows], inputs.teacher[rows], inputs.targets[rows], inputs).mean()


def all_logits(inputs: Inputs) -> Tensor:
    """All tokens, the mask applied to the finished losses."""
    losses_T = _row_losses(inputs.student, inputs.teacher, inputs.targets, inputs)
    return (losses_T * inputs.is_supervised).sum() / inputs.is_supervised.sum()


def liger_cross_entropy(inputs: Inputs) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    targets_R = inputs.targets[inputs.rows]
    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(inputs.head.weight, inputs.student[inputs.rows], targets_R)
    return loss


def liger_kl(inputs: Inputs) -> Tensor:
    """Liger's fused linear JSD, which at beta 0 is the forward KL, and its fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    rows, weights = inputs.rows, (inputs.head.weight, inputs.teacher_head.weight)
    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    found: Tensor = loss(inputs.student[rows], weights[0], inputs.teacher[rows], weights[1], inputs.targets[rows])
    return found + liger_cross_entropy(inputs)


def liger_chunked(inputs: Inputs) -> Tensor:
    """Liger's chunked linear JSD with cross-entropy, another loss (it has no KL): its time and memory alone count."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(compiled=inputs.student.is_cuda, chunk_size=CHUNK_SIZE)
    rows, weights = inputs.rows, (inputs.head.weight, inputs.teacher_head.weight)
    found: Tensor = loss(inputs.student[rows], weights[0], inputs.teacher[rows], weights[1], inputs.targets[rows])
    return found


def _row_losses(student_RD: Tensor, teacher_RD: Tensor, targets_R: Tensor, inputs: Inputs) -> Tensor:
    """The formulas, in torch operations over whole rows."""
    logits_RV = inputs.head.logits(student_RD)
    total_R = student_RD.new_zeros(len(student_RD), dtype=torch.float32)
    if inputs.has_teacher:
        with torch.no_grad():
            log_p_RV = torch.log_softmax(inputs.teacher_head.logits(teacher_RD), dim=-1)
        log_q_RV = torch.log_softmax(logits_RV, dim=-1)
        is_forward = inputs.divergence.kind == "forward_kl"
        total_R = total_R + (kl(log_p_RV, log_q_RV) if is_forward else kl(log_q_RV, log_p_RV))
    if inputs.has_targets:
        total_R = total_R + dense_cross_entropy(logits_RV, targets_R, reduction="none")
    return total_R


def _work(inputs: Inputs, loss: Loss, problem: Problem) -> Work:
    leaves = [inputs.student] + ([] if problem.frozen_head else [inputs.head.weight])

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = loss(inputs)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    def outputs() -> Mapping[str, Tensor]:
        value = step().detach()
        gradients = {"hidden": inputs.student.grad, "head": inputs.head.weight.grad}
        return {"loss": value} | {name: grad for name, grad in gradients.items() if grad is not None}

    return Work(step, None if loss is liger_chunked else outputs, {"flop": _flop(problem)})


def _floor(inputs: Inputs, problem: Problem) -> Work:
    """The products alone, all rows at once."""
    rows_RD, teacher_RD = inputs.student.detach()[inputs.rows], inputs.teacher[inputs.rows]
    weight_VD, teacher_VD = inputs.head.weight.detach(), inputs.teacher_head.weight
    logits_RV = rows_RD.new_empty(problem.rows, problem.vocabulary)
    teacher_RV = torch.empty_like(logits_RV) if inputs.has_teacher else None
    gradients = torch.empty_like(rows_RD), None if problem.frozen_head else torch.empty_like(weight_VD)

    def step() -> None:
        torch.mm(rows_RD, weight_VD.T, out=logits_RV)
        if teacher_RV is not None:
            torch.mm(teacher_RD, teacher_VD.T, out=teacher_RV)
        torch.mm(logits_RV, weight_VD, out=gradients[0])
        if gradients[1] is not None:
            torch.mm(logits_RV.T, rows_RD, out=gradients[1])

    return Work(step, None, {"flop": _flop(problem)})


def _flop(problem: Problem) -> float:
    products = 2 if problem.frozen_head else 3
    width = products * problem.width + ("kd" in problem.loss) * problem.teacher_width
    return 2.0 * problem.rows * problem.vocabulary * width


def _head_gradient_gib(inputs: Inputs) -> float:
    weight = inputs.head.weight
    return weight.nbytes / 2**30 if weight.requires_grad else 0.0


def _reference(inputs: Inputs) -> Mapping[str, Tensor]:
    """The supervised rows in float32, of the same values, a few at a time where they are many."""
    rows_RD = inputs.student.detach()[inputs.rows].float().requires_grad_()
    weight_VD = inputs.head.weight.detach().float().requires_grad_(inputs.head.weight.requires_grad)
    teacher_RD, targets_R = inputs.teacher[inputs.rows].float(), inputs.targets[inputs.rows]
    teacher_head = Head(inputs.teacher_head.weight.float())
    wide = dataclasses.replace(inputs, head=Head(weight_VD), teacher_head=teacher_head)
    total = rows_RD.new_zeros(())
    for part in torch.arange(len(rows_RD), device=rows_RD.device).split(256):
        loss = _row_losses(rows_RD[part], teacher_RD[part], targets_R[part], wide).sum() / len(rows_RD)
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    hidden_TD = torch.zeros_like(inputs.student, dtype=torch.float32)
    assert rows_RD.grad is not None
    hidden_TD[inputs.rows] = rows_RD.grad
    found: dict[str, Tensor] = {"loss": total, "hidden": hidden_TD}
    return found if weight_VD.grad is None else {**found, "head": weight_VD.grad}
