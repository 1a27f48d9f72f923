"""Matrix products that end in a sum of another dtype: gradients of float32 parameters from bfloat16 factors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor, *, is_first: bool) -> None:
    """``sum += left @ right`` where `sum` lies, or ``sum = left @ right``, without a product of its own.

    A float32 sum of bfloat16 factors is one cuBLAS call on a GPU; elsewhere the product exists for a moment.
    """
    is_wider = sum_VD.dtype == torch.float32 != left_VC.dtype
    if sum_VD.dtype == left_VC.dtype or (is_wider and multiplies_wider(left_VC.device, left_VC.dtype)):
        options: dict[str, Any] = {"out_dtype": torch.float32} if is_wider else {}
        if is_first:
            torch.mm(left_VC, right_CD, **options, out=sum_VD)
        else:
            torch.addmm(sum_VD, left_VC, right_CD, **options, out=sum_VD)
    elif is_first:
        sum_VD.copy_(torch.mm(left_VC, right_CD))
    else:
        sum_VD.add_(torch.mm(left_VC, right_CD))


@functools.cache
def multiplies_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch multiplies into a float32 tensor of our own here; tried, as versions and devices differ."""
    factor, out = torch.ones(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        torch.mm(factor, factor, out_dtype=torch.float32, out=out)
        torch.addmm(out, factor, factor, out_dtype=torch.float32, out=out)
    except (TypeError, RuntimeError):
        return False
    return bool((out == 32).all())
