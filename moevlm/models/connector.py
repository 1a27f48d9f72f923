"""Connectors: image features to visual tokens of the language model's width."""

from __future__ import annotations

import math

from torch import Tensor, nn

CONNECTORS = ("linear", "mlp2x_gelu", "pool_mlp2x_gelu")


class Connector(nn.Module):
    """[N, P, Dv] features -> [N, num_tokens, D] visual tokens.

    With pooling, 2 x 2 neighbours of the patch grid are averaged first, so an image costs a quarter of the tokens.
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

    def forward(self, features_NPD: Tensor) -> Tensor:
        if self.grid_size is not None:
            half, width = self.grid_size // 2, features_NPD.shape[-1]
            features_NPD = features_NPD.reshape(-1, half, 2, half, 2, width).mean(dim=(2, 4)).flatten(1, 2)
        return self.layers(features_NPD)  # type: ignore[no-any-return]


def build_connector(kind: str, in_width: int, out_width: int, num_tokens: int) -> Connector:
    """A connector by name, as in LLaVA (arXiv:2310.03744): linear, mlp2x_gelu, pool_mlp2x_gelu.

    Args:
        kind: one of `CONNECTORS`.
        in_width: width of the vision encoder.
        out_width: width of the language model.
        num_tokens: features per image.

    Raises:
        ValueError: unknown kind, or a token grid that cannot be pooled.
    """
    if kind not in CONNECTORS:
        raise ValueError(f"unknown connector {kind!r}; known: {', '.join(CONNECTORS)}; set model.connector")
    if kind == "linear":
        layers = nn.Sequential(nn.Linear(in_width, out_width))
    else:
        layers = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
    return Connector(layers, kind=kind, num_input_tokens=num_tokens, pool=kind.startswith("pool_"))
