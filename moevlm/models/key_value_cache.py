"""A key-value cache of fixed size: memory is taken once, so a step that reads it can be captured and replayed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class FixedCache(Cache):
    """Keys and values of every decoder layer, [B, Hk, L, d] each, made when a layer first writes.

    It is written in one of two ways. Usually the host knows how many columns are filled, and attention gets these
    alone. After `pin(position)` a one-token step writes the column that a tensor names and attention gets all L, so
    nothing about the step depends on the host; a mask must then hide what is not filled.
    """

    def __init__(self, num_layers: int, *, batch_size: int, max_length: int) -> None:
        self.fixed_layers = [FixedLayer(batch_size, max_length) for _ in range(num_layers)]
        super().__init__(layers=list(self.fixed_layers))
        self.num_rows, self.num_columns = batch_size, max_length

    def restart(self) -> None:
        """Forget what is stored, keep the memory; the host counts columns again."""
        for layer in self.fixed_layers:
            layer.length, layer.position = 0, None

    def pin(self, position: Tensor) -> None:
        """From now on a step of one token is written into the column that `position` [1] int64 holds."""
        for layer in self.fixed_layers:
            layer.position = position


class FixedLayer(CacheLayerMixin):
    """One layer of a `FixedCache`."""

    is_compileable = True
    is_sliding = False

    def __init__(self, num_rows: int, num_columns: int) -> None:
        super().__init__()
        self.num_rows, self.num_columns = num_rows, num_columns
        self.length = 0  # columns that are filled, as far as the host knows
        self.position: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.num_rows, key_states.shape[1], self.num_columns)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new columns; fewer rows than the cache has fill its first ones. Returns all columns to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.position is not None:
            self.keys.index_copy_(2, self.position, key_states)
            self.values.index_copy_(2, self.position, value_states)
            return self.keys, self.values
        rows, end = key_states.shape[0], self.length + key_states.shape[2]
        self.keys[:rows, :, self.length : end] = key_states
        self.values[:rows, :, self.length : end] = value_states
        self.length = end
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.num_columns if self.position is not None else self.length + query_length), 0

    def get_max_length(self) -> int:
        return self.num_columns

    def get_max_cache_shape(self) -> int:  # the name in older releases of transformers 5
        return self.num_columns
