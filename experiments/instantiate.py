"""The single call of `hydra.utils.instantiate`: configs become objects here and nowhere else."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf


def build(node: DictConfig, **overrides: Any) -> Any:
    """Build the object that `node` names by ``_target_``; the code behind it sees plain lists and dicts.

    Raises:
        ValueError: the node has no ``_target_``.
    """
    if "_target_" not in node:
        raise ValueError(
            f"config node without _target_, got keys {sorted(map(str, node))}; choose a file of that config group"
        )
    return instantiate(node, _convert_="all", **overrides)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers, without Hydra's own node."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
