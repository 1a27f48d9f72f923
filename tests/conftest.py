"""What all tests share: Triton's interpreter where no GPU is, no test there that needs one, and short runs.

Triton's own functions are made when it is first imported, by whatever test comes first: so its interpreter is chosen
here.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from sys import gettrace, settrace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
gc.disable()  # until everything is imported

LONG = ("test_ranks", "test_pipeline", "test_programs", "test_recipes", "test_kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """The garbage collector skips what importing left; walking that took a sixth of the time."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Without a tracer where a test is marked so; pytest-cov's own marker has no effect in a worker of pytest-xdist."""
    if item.get_closest_marker("untraced") is None:
        return (yield)
    tracer = gettrace()
    settrace(None)
    try:
        return (yield)
    finally:
        settrace(tracer)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else extension modules report leaks at exit


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``gpu`` is skipped without a CUDA device."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
