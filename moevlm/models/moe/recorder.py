"""The way out for routing records: a transformers layer returns hidden states only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from moevlm.batch import Routing


class RoutingRecorder:
    """Collects the routing records of one call of the model; shared by a VLM and its MoE layers.

    Open only while the VLM's own forward runs. Calls while it is closed are ignored: activation checkpointing runs a
    layer a second time in the backward pass, and that record would be a duplicate.
    """

    def __init__(self) -> None:
        self.token_mask: Tensor | None = None  # [B, S] bool, True for real tokens; None: every row is real
        self.is_static = False  # a decode step whose shapes must not depend on what routers choose
        self._routings: dict[int, Routing] | None = None
        self._token_rows: Tensor | None = None

    @property
    def token_rows(self) -> Tensor | None:
        """[N] int64 rows of the real tokens among B * S; None: every row is real. The device is asked once a call."""
        if self._token_rows is None and self.token_mask is not None:
            self._token_rows = self.token_mask.flatten().nonzero().squeeze(1)
        return self._token_rows

    @property
    def is_open(self) -> bool:
        return self._routings is not None

    @contextmanager
    def open(self, token_mask: Tensor | None = None, *, static: bool = False) -> Iterator[dict[int, Routing]]:
        """Collect until the block ends; yields the records by decoder layer index.

        Args:
            token_mask: [B, S] bool for padded input (generation); MoE layers route the True tokens only.
            static: MoE layers neither ask the device nor record anything, so that the call can be captured.
        """
        if self.is_open:
            raise RuntimeError("the routing recorder is open already: a model's forward cannot run inside itself")
        routings: dict[int, Routing] = {}
        self._routings, self.token_mask, self.is_static = routings, token_mask, static
        try:
            yield routings
        finally:
            self._routings, self.token_mask, self.is_static, self._token_rows = None, None, False, None

    def record(self, layer_index: int, routing: Routing) -> None:
        """Keep the record of one layer, if open."""
        if self._routings is not None:
            self._routings[layer_index] = routing
