"""What to say when Hydra cannot compose a config: one line with the fault, the known choices and what to change."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import conf

CONF = Path(conf.__file__).parent
CONFIG_MODULE = conf.__name__

UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC)
"""Hydra makes the output folder before the program runs."""


def explain(error: BaseException, config_name: str, overrides: Sequence[str]) -> str | None:
    """The line for an error of composition, or None for any other error.

    Args:
        error: what Hydra or OmegaConf raised before or while the program read its config.
        config_name: the program's entry config, without ``.yaml``.
        overrides: the command's own overrides.
    """
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"cannot write {error.filename}: {error.strerror}; set output_root (or output) to a folder of yours"
    if isinstance(error, MissingConfigException):
        return _unknown_choice(str(error.missing_cfg_file or ""), overrides)
    if isinstance(error, OverrideParseException):
        return f"override {error.override!r} cannot be read; write key=value, and quote what the shell would take apart"
    if isinstance(error, HydraException | CompactHydraException):
        key = re.match(r"Could not override '([^']+)'", str(error))
        return _unknown_key(key[1], config_name, overrides) if key else _one_line(str(error))
    if isinstance(error, OmegaConfBaseException):
        return _config_value(error)
    return None


def known_choices(group: str) -> list[str]:
    """The files of a config group, also of its folders: ``mini/moe_tuning``."""
    folder = CONF / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _unknown_choice(missing: str, overrides: Sequence[str]) -> str:
    """`missing` is group and name in one path, where both may hold slashes; the command says where it divides."""
    groups = {override.partition("=")[0].lstrip("+").partition("@")[0] for override in overrides}
    group = next((name for name in groups if missing.startswith(f"{name}/")), missing.rpartition("/")[0])
    choice = missing.removeprefix(f"{group}/")
    known = known_choices(group)
    if not known:
        return f"unknown config {missing!r}; check --config-name and the defaults lists that name it"
    return f"unknown choice {group}={choice}{_did_you_mean(choice, known)}; known: {', '.join(known)}; set {group}"


def _unknown_key(key: str, config_name: str, overrides: Sequence[str]) -> str:
    group, _, package = key.partition("@")
    if package:
        return f"unknown config group {key!r}; one config of {group} belongs to each package of the defaults list"
    node: Any = _composed(config_name, overrides)
    path: list[str] = []
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            break
        path.append(part)
        node = node._get_node(part)
    parent = ".".join(path)
    wrong = ".".join([*path, *key.split(".")[len(path) : len(path) + 1]])
    if isinstance(node, Node) and node._is_interpolation():  # as one key that stands for another
        return f"unknown key {key}: {parent} is {node._value()} here; set the keys of that, or {parent} as a whole"
    if not isinstance(node, DictConfig) or node._is_none():
        return (
            f"unknown key {key}: {parent or config_name} is no group of keys here; set it as a whole, or choose another"
        )
    known = sorted(str(name) for name in node if name not in ("hydra", "_target_", "_partial_"))
    mean = _did_you_mean(wrong.rpartition(".")[2], known)
    more = f"; what its constructor takes but the config does not state is added as +{wrong}=..." if path else ""
    return f"unknown key {wrong}{mean}; known in {parent or config_name}: {', '.join(known)}{more}"


def _composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The config with the command's choices of files alone; a Hydra that is open stays open."""
    choices = [text for text in overrides if (CONF / text.partition("=")[0].partition("@")[0]).is_dir()]
    opened = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIG_MODULE, version_base=None):
            return compose(config_name, [choice for choice in choices if "," not in choice])
    except (HydraException, CompactHydraException, OSError, OmegaConfBaseException):
        return OmegaConf.create({})
    finally:
        GlobalHydra.instance().hydra = opened


def _config_value(error: OmegaConfBaseException) -> str:
    text = str(error)
    missing = re.search(r"[Mm]issing mandatory value: (\S+)", text)
    if isinstance(error, MissingMandatoryValue) or missing:
        key = missing[1] if missing else str(error.full_key)
        return f"{key} must be given: add {key}=<value> to the command"
    first = text.splitlines()[0] if text else type(error).__name__
    return f"{first}; check {error.full_key}" if error.full_key else first


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
