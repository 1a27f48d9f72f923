"""Next-token cross-entropy on the supervised tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy as dense_cross_entropy

from moevlm.batch import Head, VLMOutput
from moevlm.losses.chunked import sum_over_rows
from moevlm.losses.fused import fused_rows, is_fused
from moevlm.losses.mean import Mean


def cross_entropy(
    output: VLMOutput, head: Head, labels_T: Tensor, *, chunk_size: int = 1024, kernel: str = "auto"
) -> Mean:
    """``-sum_t log softmax(head.logits(h_{t-1}))[label_t]`` over the supervised tokens t; nats.

    The standard language-modelling loss. Token t is predicted by the row before its own in spliced coordinates, so the
    first answer token is supervised like every other. Rows are gathered before logits are made.

    Args:
        output: of the model that owns `head`.
        head: read after the forward pass.
        labels_T: text coordinates, IGNORE_INDEX where nothing is supervised; not shifted.
        chunk_size: rows whose logits exist at the same time; the fused path has a size of its own.
        kernel: one of `moevlm.losses.fused.KERNELS`.

    Returns:
        Sum over supervised tokens, their number, unit "targets". ``count * log V`` for uniform logits; 0 and a gradient
        of 0 when nothing is supervised.
    """
    rows_R, targets_R = output.prediction_rows(labels_T)
    if is_fused(kernel, output.hidden_states):
        total, *_ = fused_rows(output.hidden_states[rows_R], head, targets_R, lm_weight=1.0)
        return Mean(total, rows_R.numel(), "targets")

    def chunk_loss(logits_CV: Tensor, chunk: slice) -> Tensor:
        return dense_cross_entropy(logits_CV, targets_R[chunk], reduction="sum")

    total = sum_over_rows(output.hidden_states[rows_R], head, chunk_loss, chunk_size=chunk_size)
    return Mean(total, rows_R.numel(), "targets")
