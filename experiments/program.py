"""What every program shares: errors a person can act on instead of a traceback."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.composition_errors import explain
from moevlm.benchmarks.shares import told

USER_ERRORS = (ValueError, OSError, OmegaConfBaseException)
"""What a config or data can cause. Anything else is a defect of ours and keeps its traceback."""


class FailedTrials(CompactHydraException):
    """Raised by each failed trial of a sweep. Hydra shows the first when all trials have run; it speaks for all."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__()
        self.failures = failures  # shared by all trials of the process

    def __str__(self) -> str:
        return "\n".join([f"failed trials: {len(self.failures)}; the others are complete", *self.failures])


def program(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """A task over a composed config becomes a program: ``@program("train")`` on ``main(cfg)``.

    User errors, those of composing the config included, end in one line and exit code 2; ``MOEVLM_TRACEBACK=1`` shows
    where they came from. ``MOEVLM_PROFILE=1`` prints where the time went. In a sweep the remaining trials run, and a
    summary of the failed ones ends it.

    Args:
        config_name: the entry config in ``conf/``, without ``.yaml``.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        composed = hydra.main(version_base=None, config_path="../conf", config_name=config_name)(_reported(task))

        @functools.wraps(task)
        def main() -> None:
            with _errors_of_hydra() as shown_by_hydra:
                try:
                    composed()
                except FailedTrials as error:
                    print(error, file=sys.stderr, flush=True)
                    sys.exit(1)
                except Exception as error:
                    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
                    message = explain(error, config_name, overrides)
                    if message is None or shown_by_hydra or os.environ.get("MOEVLM_TRACEBACK") == "1":
                        raise
                    print(f"error: {message}", file=sys.stderr, flush=True)
                    sys.exit(2)

        return main

    return decorate


@contextmanager
def _errors_of_hydra() -> Iterator[bool]:
    """Have Hydra raise what it would print; True when the user asked for its tracebacks anyhow."""
    asked = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield asked == "1"
    finally:
        if asked is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = asked


def _reported(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """The task, its user errors told in one line."""
    failures: list[str] = []

    @functools.wraps(task)
    def run(cfg: DictConfig) -> Any:
        log_to_terminal()
        quiet_libraries()
        try:
            with told() if os.environ.get("MOEVLM_PROFILE") == "1" else nullcontext():
                return task(cfg)
        except Exception as error:
            message = error_message(error)
            is_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
            if message is None or os.environ.get("MOEVLM_TRACEBACK") == "1":
                if not is_sweep:
                    raise
                traceback.print_exc()
            print(f"error: {message or repr(error)}", file=sys.stderr, flush=True)
            if not is_sweep:
                sys.exit(2)
            failures.append(f"  {HydraConfig.get().job.override_dirname}: {message or repr(error)}")
            raise FailedTrials(failures) from None

    return run


def error_message(error: BaseException) -> str | None:
    """What to tell the user; None for a defect of ours.

    Hydra wraps what a constructor raises in its own text, which says less. Of the errors below, the outermost
    user error speaks: code that raises one from another has added what to change.
    """
    if isinstance(error, InstantiationException):
        node = re.search(r"full_key: (\S+)", str(error))
        where = f"; check {node[1] if node else 'the config'}"
        if isinstance(error.__cause__, TypeError):  # a key that the constructor does not know, a word for a number
            return f"{error.__cause__}{where}"
        if str(error).startswith("Error locating target"):
            return str(error).partition(",")[0] + where
        return None if error.__cause__ is None else error_message(error.__cause__)
    while not isinstance(error, USER_ERRORS) and error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, USER_ERRORS):
        return None
    if isinstance(error, OmegaConfBaseException):
        return explain(error, "", [])
    return str(error) or type(error).__name__


def log_to_terminal() -> None:
    """Warnings go to stderr as they are; Hydra's own handler would print them as Hydra's, with the time, on stdout."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)


def quiet_libraries() -> None:
    """Silence messages that a user can do nothing about, named one by one."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*is experimental.*", module="lightning.*")
