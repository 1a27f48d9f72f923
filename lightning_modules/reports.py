"""Tables printed before a run."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from torch import nn

from moevlm.models.freezing import trainable_table


def print_trainable(model: nn.Module, console: Console | None = None) -> None:
    """Print how many parameters of each part of `model` there are and how many of them train."""
    table = Table(title="What trains")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    rows = list(trainable_table(model))
    for part, total, trainable in rows:
        table.add_row(part, f"{total:,}", f"{trainable:,}", style="bold" if trainable else "dim")
    (console or Console()).print(table)
