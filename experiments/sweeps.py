"""Sweeps (``-m``): short names for the folders of trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

EXCLUDE = "hydra.job.config.override_dirname.exclude_keys"


class NameTrialsByWhatVaries(Callback):
    """Leave overrides that all trials share out of ``hydra.job.override_dirname``, which names each trial's folder.

    A trial is then found, and resumed, under what tells it from the others:
    ``model.moe.num_experts=2,model.moe.top_k=1``.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before it composes the trials, each from these overrides and its own."""
        shared = shared_keys(config.hydra.overrides.task)
        with open_dict(config):
            config.hydra.overrides.hydra.append(f"{EXCLUDE}=[{','.join(repr(key) for key in shared)}]")


def shared_keys(overrides: Sequence[str]) -> list[str]:
    """Keys of a sweep's overrides that have one value.

    The experiment counts as shared even where it varies, unless run_name is given: each has a run_name, and so a
    folder, of its own.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    varying = {override.key_or_group for override in parsed if override.is_sweep_override()}
    shared = {override.key_or_group for override in parsed} - varying
    if "run_name" not in shared:
        shared.add("experiment")
    return sorted(shared)
