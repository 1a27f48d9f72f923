"""Why a sample was left out."""

from __future__ import annotations

from dataclasses import dataclass


class RejectedRecord(ValueError):  # noqa: N818 - a verdict on data, counted and named, seldom an error
    """A record that cannot be used; `reason` is a stable word that is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Rejection:
    """One sample that was left out, and why."""

    key: str
    reason: str
    detail: str = ""
