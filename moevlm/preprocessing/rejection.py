"""Why a sample cannot be encoded."""

from __future__ import annotations


class RejectedSample(ValueError):  # noqa: N818 - a verdict on data, counted and named, seldom an error
    """A sample that cannot be turned into tokens and pixels; `reason` is a stable word that is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
