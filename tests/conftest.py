"""What all tests share: Triton's interpreter where there is no GPU, and there no test that needs one.

Triton's own functions are made when it is first imported, by whatever test comes first: so its interpreter is chosen
here.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``gpu`` is skipped without a CUDA device."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
