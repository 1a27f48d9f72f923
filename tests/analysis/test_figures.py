from pathlib import Path

import pytest
import torch
from PIL import Image

from moevlm.analysis.figures import save_figures
from moevlm.analysis.statistics import RoutingStatistics
from tests.analysis.test_statistics import make_routing, make_segments


@pytest.mark.parametrize("num_experts", [[2], [2, 8, 20], [4] * 10], ids=str)
def test_three_figures_are_drawn_for_any_layers_and_experts(num_experts: list[int], tmp_path: Path) -> None:
    statistics = RoutingStatistics()
    routings = {2 * index: make_routing(60, count, 1, index) for index, count in enumerate(num_experts)}
    statistics.add(routings, make_segments(60, 0))
    paths = save_figures(statistics, tmp_path, title="test")
    assert [path.stem for path in paths] == ["expert_load", "modality_distribution", "token_pathways"]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 20  # something is drawn


def test_text_only_routing_is_drawn_too(tmp_path: Path) -> None:
    statistics = RoutingStatistics()
    statistics.add({0: make_routing(10, 4, 2, 0)}, torch.full((10,), 3))
    assert all(path.stat().st_size > 5000 for path in save_figures(statistics, tmp_path))
