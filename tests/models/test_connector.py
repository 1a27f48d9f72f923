import pytest
import torch
from torch import nn

from moevlm.models.connector import build_connector


@pytest.mark.parametrize(
    ("kind", "num_tokens"), [("linear", 16), ("mlp2x_gelu", 16), ("norm_mlp2x_gelu", 16), ("pool_mlp2x_gelu", 4)]
)
def test_shapes_are_as_announced(kind, num_tokens):
    connector = build_connector(kind, 6, 10, 16)
    assert connector(torch.randn(3, 16, 6)).shape == (3, connector.num_tokens, 10) == (3, num_tokens, 10)


def test_pooling_averages_two_by_two_neighbours_of_the_grid():
    connector = build_connector("pool_mlp2x_gelu", 3, 5, 16)
    features = torch.randn(2, 16, 3)
    grid = features.transpose(1, 2).reshape(2, 3, 4, 4)
    pooled = nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(connector(features), connector.layers(pooled))


def test_a_normed_connector_does_not_see_the_scale_of_the_features():
    connector, features = build_connector("norm_mlp2x_gelu", 6, 10, 16), torch.randn(2, 16, 6)
    torch.testing.assert_close(connector(features), connector(7 * features + 3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [17, 9, 12])
def test_a_grid_that_cannot_be_pooled_is_refused(num_tokens):
    with pytest.raises(ValueError, match=f"square grid with an even side, got {num_tokens} tokens"):
        build_connector("pool_mlp2x_gelu", 3, 5, num_tokens)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown connector 'qformer'; known: linear, mlp2x_gelu, norm_mlp2x_gelu, pool_mlp2x_gelu"
    ):
        build_connector("qformer", 3, 5, 16)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "pool_mlp2x_gelu", "anyres_mlp2x_gelu"])
def test_no_two_layers_of_a_connector_share_a_weight(kind):
    connector = build_connector(kind, 6, 10, 16)
    weights = [layer.weight for layer in connector.layers if isinstance(layer, nn.Linear)]
    assert len({weight.data_ptr() for weight in weights}) == len(weights) == (1 if kind == "linear" else 2)
    assert len(list(connector.named_parameters(remove_duplicate=False))) == len(list(connector.parameters()))


def test_a_newline_needs_a_square_of_tokens():
    with pytest.raises(ValueError, match=r"joins square tiles, got 17 tokens per picture; set model\.vision_encoder"):
        build_connector("anyres_linear", 3, 5, 17)
