"""Connectors: image features to visual tokens of the language model's width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ANYRES = "anyres_"
"""Prefix of the kinds that join the tiles of an image and end each line of their grid in a learned newline token."""

SPLICE = "+"
"""Joins two parts: ``mlp2x_gelu@3584+linear`` is one to 3584, a teacher's width, and a linear map behind it."""

CONNECTORS = ("linear", "mlp2x_gelu", "norm_mlp2x_gelu", "pool_mlp2x_gelu")


class Connector(nn.Module):
    """[N, P, Dv] features -> [N, num_tokens, D] visual tokens.

    With pooling, 2 x 2 neighbours of the patch grid are averaged first, so an image costs a quarter of the tokens. An
    ``anyres_`` kind also joins tiles: given an index, it returns the tokens of all images in one row.
    """

    def __init__(self, layers: nn.Sequential, *, kind: str, num_input_tokens: int, pool: bool) -> None:
        super().__init__()
        self.layers = layers
        self.kind = kind
        self.grid_size = math.isqrt(num_input_tokens) if pool else None
        if self.grid_size is not None and (self.grid_size**2 != num_input_tokens or self.grid_size % 2):
            raise ValueError(
                f"connector {kind!r} pools 2 x 2 patches and needs a square grid with an even side, got "
                f"{num_input_tokens} tokens per image; set model.vision_encoder.keep_cls=false, another image_size, "
                "or another model.connector"
            )
        self.num_tokens = num_input_tokens if self.grid_size is None else num_input_tokens // 4
        self.image_newline: nn.Parameter | None = None  # [D]

    @property
    def side(self) -> int:
        """Tokens along a side of one picture, of a kind that joins tiles."""
        return math.isqrt(self.num_tokens)

    def add_newline(self, width: int) -> None:
        """Learn a newline token, drawn as LLaVA-NeXT draws it: normal, std ``width**-0.5``.

        Raises:
            ValueError: the tokens of a picture form no square.
        """
        if self.side**2 != self.num_tokens:
            raise ValueError(
                f"connector {self.kind!r} joins square tiles, got {self.num_tokens} tokens per picture; set "
                "model.vision_encoder.keep_cls=false or another model.connector"
            )
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, features_NPD: Tensor, tiled_index_U: Tensor | None = None) -> Tensor:
        """[N, P, Dv] -> [N, num_tokens, D]; with an index, [U, D]: row ``N * num_tokens`` is the newline."""
        if self.grid_size is not None:
            half, width = self.grid_size // 2, features_NPD.shape[-1]
            features_NPD = features_NPD.reshape(-1, half, 2, half, 2, width).mean(dim=(2, 4)).flatten(1, 2)
        tokens_NPD: Tensor = self.layers(features_NPD)
        if self.image_newline is None:
            return tokens_NPD
        if tiled_index_U is None:
            return tokens_NPD + self.image_newline.sum() * 0  # every parameter takes part in every step
        rows_MD = torch.cat([tokens_NPD.flatten(0, 1), self.image_newline[None]])
        return rows_MD.index_select(0, tiled_index_U)


def build_connector(kind: str, in_width: int, out_width: int, num_tokens: int) -> Connector:
    """A connector by name, as in LLaVA (arXiv:2310.03744): linear, mlp2x_gelu, pool_mlp2x_gelu.

    ``norm_mlp2x_gelu`` has a layer norm in front, as InternVL's (arXiv:2312.14238): features before an encoder's last
    norm have directions of very unequal size.

    Args:
        kind: one of `CONNECTORS`, for images of any resolution behind ``anyres_``; or two, see `SPLICE`.
        in_width: width of the vision encoder.
        out_width: width of the language model.
        num_tokens: features per image.

    Raises:
        ValueError: unknown kind, or a token grid that cannot be pooled.
    """
    base, second, width = _parse(kind)
    layers = _layers(base, in_width, out_width)
    if second is not None:
        layers = nn.Sequential(_layers(base, in_width, width), _layers(second, width, out_width))
    connector = Connector(layers, kind=kind, num_input_tokens=num_tokens, pool=base.startswith("pool_"))
    if kind.startswith(ANYRES):
        connector.add_newline(out_width)
    return connector


def _parse(kind: str) -> tuple[str, str | None, int]:
    """The first part without its prefix, the second part if there is one, and the width between them."""
    first, _, second = kind.removeprefix(ANYRES).partition(SPLICE)
    base, _, width = first.partition("@")
    is_pair = bool(second)
    if (
        base not in CONNECTORS
        or (is_pair and (second not in CONNECTORS[:2] or not width.isdigit()))
        or (not is_pair and first != base)
    ):
        known = f"{', '.join(CONNECTORS)}, or {ANYRES} and one of them, or two parts such as mlp2x_gelu@3584+linear"
        raise ValueError(f"unknown connector {kind!r}; known: {known}; set model.connector")
    return base, second or None, int(width) if is_pair else 0


def _layers(kind: str, in_width: int, out_width: int) -> nn.Sequential:
    if kind == "linear":
        return nn.Sequential(nn.Linear(in_width, out_width))
    norm = [nn.LayerNorm(in_width)] if kind.startswith("norm_") else []
    return nn.Sequential(*norm, nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
