"""Attention over a packed row: every sequence attends to itself only.

Registered with transformers' attention interface under `PACKED_ATTENTION`. A block-diagonal mask over the whole row
would be quadratic in the row (1.7-3.2 times slower than padding on CPU), so the row is cut into its sequences and
attention runs causally without a mask. On a GPU in 16 bits a kernel for sequences of any length takes the row as it is
(`moevlm.models.varlen`). Where that does not apply, all sequences run at once, padded on the right to the longest,
where padding stands behind every real token; on a CPU one sequence after another.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from moevlm.batch import AttentionStates
from moevlm.models.varlen import check_kernel, takes_varlen, varlen_attention

PACKED_ATTENTION = "moevlm_packed"


class PackedSequences:
    """Where the sequences of a row lie; built once per forward and handed down to every layer.

    Not a dataclass, because FSDP2 would hand a copy to each layer.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        device: torch.device,
        keep: Sequence[int] = (),
        *,
        one_by_one: bool | None = None,  # None: on a CPU
        kernel: str = "auto",
    ) -> None:
        """Lay out the sequences.

        Args:
            kernel: one of `moevlm.models.varlen.KERNELS`.

        Raises:
            ValueError: an unknown kernel, or "varlen" without a GPU or in a torch that lacks it.
        """
        self.lengths, self.device = lengths, device  # [B]
        self.longest = max(lengths)
        self.ends: Tensor | None = None  # [B + 1] int32, 0 and the end of each sequence; None: padded
        if check_kernel(kernel, device):
            ends = [0, *itertools.accumulate(lengths)]
            self.ends = torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True)
        self.keep = frozenset(keep)  # layers whose queries and keys the caller wants
        self.kept: dict[int, AttentionStates] = {}  # of the forward pass; recomputation in backward adds nothing
        self.pad_index: Tensor | None = None  # [B * S] row of every padded place; padding repeats row 0
        self.unpad_index: Tensor | None = None  # [U] padded place of every row; both None when nothing is padded
        self.reached_attention = False
        one_by_one = device.type == "cpu" if one_by_one is None else one_by_one
        self.one_by_one = one_by_one and min(lengths) < self.longest

    def _make_indices(self) -> None:
        """Once, and only where sequences are padded at all."""
        if self.pad_index is not None or min(self.lengths) == self.longest:
            return
        pad_index = torch.zeros(len(self.lengths), self.longest, dtype=torch.int64)
        unpad_index = torch.empty(sum(self.lengths), dtype=torch.int64)
        start = 0
        for row, length in enumerate(self.lengths):
            pad_index[row, :length] = torch.arange(start, start + length)
            unpad_index[start : start + length] = torch.arange(row * self.longest, row * self.longest + length)
            start += length
        self.pad_index, self.unpad_index = pad_index.flatten().to(self.device), unpad_index.to(self.device)

    def as_mask(self) -> Tensor:
        """A stand-in for an attention mask that carries this object; nothing reads its value.

        For layers that keep their keyword arguments to themselves (StableLM): the mask is what they hand to attention.
        """
        mask = torch.empty(1, 1, 1, 1, dtype=torch.bool).as_subclass(PackedMask)  # four dimensions pass unchanged
        mask.packed_sequences = self
        return mask

    def cut(self, states_1HUD: Tensor) -> Sequence[Tensor]:
        """[1, H, U, d] -> the [b, H, s, d] that attention runs over one after another.

        A GPU takes all sequences at once, padded. A CPU takes them one by one: nothing is launched there, and padding
        to the longest costs three times the work where short answers stand beside long conversations.
        """
        return states_1HUD.split(self.lengths, dim=2) if self.one_by_one else [self._pad(states_1HUD)]

    def join(self, outputs_BSHD: Sequence[Tensor]) -> Tensor:
        """What attention made of each of `cut` -> [1, U, H, d], the layout that transformers expects back."""
        if self.one_by_one:
            return torch.cat(list(outputs_BSHD), dim=1)
        return self._unpad(outputs_BSHD[0].transpose(1, 2))

    def _pad(self, states_1HUD: Tensor) -> Tensor:
        """[1, H, U, d] -> [B, H, S, d]."""
        self._make_indices()
        states_HUD = states_1HUD[0]
        if self.pad_index is not None:
            states_HUD = _Pad.apply(states_HUD, self.pad_index, self.unpad_index)
        return states_HUD.unflatten(1, (len(self.lengths), -1)).transpose(0, 1)

    def _unpad(self, states_BHSD: Tensor) -> Tensor:
        """[B, H, S, d] -> [1, U, H, d]."""
        states_UHD = states_BHSD.transpose(1, 2).flatten(0, 1)
        if self.unpad_index is not None:
            states_UHD = _Unpad.apply(states_UHD, self.unpad_index)
        return states_UHD.unsqueeze(0)


class _Pad(torch.autograd.Function):
    """Rows to padded places. Every real row has one place, so the backward is a gather as well.

    `index_select` alone would add up gradients row by row: on a GPU all of the padding in one row, one after another.
    """

    @staticmethod
    def forward(ctx: Any, states_HUD: Tensor, pad_index: Tensor, unpad_index: Tensor) -> Tensor:
        ctx.save_for_backward(unpad_index)
        return states_HUD.index_select(1, pad_index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (unpad_index,) = ctx.saved_tensors  # what attention gives back at a padding place is thrown away: no gradient
        return grad_outputs[0].index_select(1, unpad_index), None, None


class _Unpad(torch.autograd.Function):
    """Padded places to rows; the gradient of padding is zero."""

    @staticmethod
    def forward(ctx: Any, states_PHD: Tensor, unpad_index: Tensor) -> Tensor:
        ctx.save_for_backward(unpad_index)
        ctx.num_places = states_PHD.shape[0]
        return states_PHD.index_select(0, unpad_index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (unpad_index,) = ctx.saved_tensors
        grad_PHD = grad_outputs[0].new_zeros(ctx.num_places, *grad_outputs[0].shape[1:])
        return grad_PHD.index_copy_(0, unpad_index, grad_outputs[0]), None


class PackedMask(Tensor):
    """See `PackedSequences.as_mask`."""

    packed_sequences: PackedSequences


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_sequences: PackedSequences | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    query_position: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal softmax attention, per sequence of a packed row or, without `packed_sequences`, with the mask given.

    Args:
        query: [1, H, U, d] packed, or [B, H, S, d] in generation; key and value likewise, with fewer heads if grouped.
        attention_mask: [B, 1, S, S_total], bool (True attends) or additive, in generation; otherwise None.
        packed_sequences: handed through the decoder's keyword arguments, or by a `PackedMask`.
        sliding_window: keys further back than this are not seen (Mistral, arXiv:2310.06825).
        softcap: ``c * tanh(scores / c)`` (Gemma 2, arXiv:2408.00118).
        query_position: [S] column of each query, in generation from a pinned cache; None: the last S columns.
    """
    if isinstance(attention_mask, PackedMask):
        packed_sequences, attention_mask = attention_mask.packed_sequences, None
    options: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, **kwargs}
    if packed_sequences is None:
        options["query_position"] = query_position
        return _attend(module, query, key, value, attention_mask, dropout=dropout, **options), None
    return _attend_packed(module, query, key, value, packed_sequences, {"dropout": dropout, **options}), None


@torch.compiler.disable  # a compiled layer is cut here: what follows looks at every length
def _attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed_sequences: PackedSequences,
    options: dict[str, Any],
) -> Tensor:
    """[1, H, U, d] three times -> [1, U, H, d], every sequence by itself."""
    packed_sequences.reached_attention = True
    scaling, window, softcap = options["scaling"], options["sliding_window"], options["softcap"]
    index = getattr(module, "layer_idx", None)
    if index in packed_sequences.keep and index not in packed_sequences.kept:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        packed_sequences.kept[index] = AttentionStates(query[0], key[0], scale, softcap, window)
    ends, longest = packed_sequences.ends, packed_sequences.longest
    if takes_varlen(ends, query, value, dropout=options["dropout"], sliding_window=window, softcap=softcap):
        return varlen_attention(query, key, value, ends, longest, scaling=scaling, sliding_window=window)
    queries, keys, values = (packed_sequences.cut(states) for states in (query, key, value))
    outputs = [_attend(module, *qkv, mask=None, **options) for qkv in zip(queries, keys, values)]
    return packed_sequences.join(outputs)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    query_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """[B, H, S, d] three times -> [B, S, H, d]; causal without a mask."""
    mask = _window_mask(query, key, mask, sliding_window, query_position)
    if softcap is not None:
        return _softcapped(query, key, value, mask, dropout=dropout, scaling=scaling, softcap=softcap)
    output_BSHD, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    return output_BSHD


def _window_mask(
    query: Tensor, key: Tensor, mask: Tensor | None, sliding_window: int | None, query_position: Tensor | None = None
) -> Tensor | None:
    """The mask narrowed to a sliding window, where one is in force and shorter than the keys."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if sliding_window is None or num_keys <= sliding_window:
        return mask
    key_places = torch.arange(num_keys, device=key.device)
    query_places = (key_places[num_keys - num_queries :] if query_position is None else query_position)[:, None]
    window = (key_places > query_places - sliding_window) & (key_places <= query_places)
    if mask is None:
        return window[None, None]
    if mask.dtype == torch.bool:
        return mask & window
    return mask.masked_fill(~window, torch.finfo(mask.dtype).min)


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """SDPA has no soft cap; scores are made in full here, per sequence, softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout)
    return (weights @ value).transpose(1, 2)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
