"""What every program shares: errors a person can act on instead of a traceback."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

USER_ERRORS = (ValueError, OSError, OmegaConfBaseException)
"""What a config or data can cause. Anything else is a defect of ours and keeps its traceback."""


def program(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Turn user errors into one line and exit code 2; ``MOEVLM_TRACEBACK=1`` shows where they came from.

    In a sweep the error goes on to Hydra, which runs the remaining trials and reports the failed ones at the end.
    """

    @functools.wraps(task)
    def run(cfg: DictConfig) -> Any:
        quiet_libraries()
        try:
            return task(cfg)
        except USER_ERRORS as error:
            message = error_message(error)
            print(f"error: {message}", file=sys.stderr, flush=True)
            if os.environ.get("MOEVLM_TRACEBACK") == "1":
                raise
            if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
                raise RuntimeError(message) from None
            sys.exit(2)

    return run


def error_message(error: BaseException) -> str:
    """The innermost user error: Hydra wraps what a constructor raises in its own text."""
    while error.__cause__ is not None and isinstance(error.__cause__, USER_ERRORS):
        error = error.__cause__
    return str(error) or type(error).__name__


def quiet_libraries() -> None:
    """Silence messages that a user can do nothing about, named one by one."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*is experimental.*", module="lightning.*")
