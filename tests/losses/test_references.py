"""References of preference distillation, and the log-ratios to them."""

from __future__ import annotations

import pytest
import torch

from moevlm.losses.references import blend_references


def test_a_blend_lies_between_its_references() -> None:
    references = {"teacher": torch.tensor([-1.0]), "self": torch.tensor([-3.0])}
    assert blend_references(references, 0.25).item() == pytest.approx(-2.5)
    assert blend_references({"self": references["self"]}, 0.25).item() == -3.0
