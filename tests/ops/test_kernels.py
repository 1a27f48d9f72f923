"""Triton kernels compute what their plain twins compute: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.kernel_checks import CHECKS, LARGE, SHAPES, problems

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def interpreted(*arguments: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.kernel_checks", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_interpreted_kernels_equal_their_twins() -> None:
    assert interpreted("1", "2").count("ok ") == 2 * 2 * len(CHECKS)


def test_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.compile_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_interpreted_kernels_equal_their_twins_in_every_shape() -> None:
    assert interpreted(*map(str, range(len(SHAPES)))).count("ok ") == len(SHAPES) * 2 * len(CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_compiled_kernels_equal_their_twins(check: str) -> None:
    for name, problem in problems("cuda", SHAPES[1:4] + LARGE):
        try:
            CHECKS[check](problem)
        except Exception as error:
            raise AssertionError(name) from error
