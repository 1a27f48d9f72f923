"""Processes that do a chain's jobs: each imports the libraries once, has one GPU, and is replaced when it dies."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from hydra import initialize_config_module

from experiments.jobs import Job
from experiments.launching import end_with_parent
from experiments.program import error_message, log_to_terminal, quiet_libraries

STOP_SECONDS = 60
"""How long a process may take to save after SIGTERM before it is killed."""


class Worker:
    """A process that does one job at a time. It has an environment of its own and Hydra open."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.job: Job | None = None
        context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
        self.connection, its_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(its_end,))
        with _environment(self.environment):  # OpenMP reads it when torch is imported, before `_serve` runs
            self.process.start()
        its_end.close()

    def give(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # `answer` will say that it died
            self.connection.send(job)

    def answer(self) -> tuple[bool, str]:
        """Whether its job is done, and what there is to say; waits for it. The worker is free then, or dead."""
        self.job = None
        try:
            is_done, message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return False, f"its process ended with exit code {self.process.exitcode}"
        return is_done, message

    def stop(self) -> None:
        """Let a free worker end; one with a job saves first, as after any SIGTERM."""
        self.connection.close()
        if self.job is not None:
            self.process.terminate()
        self.process.join(STOP_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def environments(num_workers: int) -> list[dict[str, str]]:
    """What differs between workers: GPUs in turn, and as many threads as cores allow without crowding.

    An OMP_NUM_THREADS that is set stays where it is less.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(min(max(1, cores // num_workers), int(os.environ.get("OMP_NUM_THREADS") or cores)))
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(gpu) for gpu in range(torch.cuda.device_count())] if listed is None else listed.split(",")
    gpus = gpus if torch.cuda.device_count() else [""]
    of_gpus = [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus[0] else {} for number in range(num_workers)]
    return [{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **of_gpu} for of_gpu in of_gpus]


def _serve(connection: Connection) -> None:
    """Do jobs until the other end closes."""
    end_with_parent()
    with initialize_config_module("conf", version_base=None):
        while True:
            try:
                job = connection.recv()
            except EOFError:
                return
            with _terminal_in(job.folder / "log.txt"):
                answer = _attempt(job)
            connection.send(answer)
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def _attempt(job: Job) -> tuple[bool, str]:
    log_to_terminal()
    quiet_libraries()
    try:
        return True, job.run()
    except Exception as error:
        traceback.print_exc()
        return False, error_message(error) or repr(error)


@contextlib.contextmanager
def _terminal_in(file: Path) -> Iterator[None]:
    """Have all that this process and its libraries print appended to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = [os.dup(number) for number in (1, 2)]
    with file.open("a") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, kept in zip((1, 2), before):
                os.dup2(kept, number)
                os.close(kept)


@contextlib.contextmanager
def _environment(values: Mapping[str, Any]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
