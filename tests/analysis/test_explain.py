import json
from pathlib import Path

import pytest
import torch

from moevlm.analysis.collect import collect_routing
from moevlm.analysis.explain import analyze_folder
from moevlm.analysis.statistics import RoutingStatistics
from moevlm.batch import EncodedSample
from moevlm.models.pretrained import save_pretrained
from moevlm.preprocessing.images import ImageTransform
from moevlm.preprocessing.processor import Processor
from moevlm.world.writer import write_world
from tests.tiny import IMAGE_SIZE, tiny_batch, tiny_decoder_config, tiny_tokenizer, tiny_vlm

MOE = {"num_experts": 4, "top_k": 2, "router_init_std": 1.0}
OPTIONS = {"device": "cpu", "progress": False}


def make_samples() -> list[EncodedSample]:
    batches = [tiny_batch([letters], content_seed=row) for row, letters in enumerate(["siqqaa", "sqqaaa", "iqaqa"])]
    return [EncodedSample(str(i), b.input_ids, b.labels, b.segments, b.images) for i, b in enumerate(batches)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "world"
    write_world(folder, seed=0, num_train=2, num_validation=1, num_test=3, image_size=48, vqa_per_kind=2)
    return folder


def save_model(folder: Path, moe: dict[str, object] | None) -> Path:
    save_pretrained(tiny_vlm(moe, language_model=tiny_decoder_config(max_position_embeddings=4096)), folder)
    transform = ImageTransform(image_size=IMAGE_SIZE, mean=[0.5] * 3, std=[0.5] * 3, mode="pad")
    Processor(tiny_tokenizer(), "chatml", transform).save_pretrained(folder)
    return folder


def test_batches_of_any_size_give_the_same_counts() -> None:
    vlm, samples = tiny_vlm(MOE).eval(), make_samples()
    together = collect_routing(vlm, samples, batch_size=3)
    alone = collect_routing(vlm, samples, batch_size=1)
    assert alone.pathways == together.pathways
    for index, layer in together.layers.items():
        assert (alone.layers[index].choices == layer.choices).all()
    assert together.num_tokens == sum(len(sample.input_ids) for sample in samples) + 2 * (vlm.num_visual_tokens - 1)
    assert together.pathways["image"].total() == 2 * vlm.num_visual_tokens


def test_a_router_that_always_says_the_same_gives_one_path() -> None:
    vlm = tiny_vlm({**MOE, "top_k": 1}).eval()
    with torch.no_grad():
        for layer in vlm.moe_layers.values():
            layer.router.weight.zero_()
    statistics = collect_routing(vlm, make_samples(), batch_size=2)
    assert len(statistics.pathways["text"]) == 1
    assert all(sorted(layer.load)[-1] == 1 for layer in statistics.layers.values())


def test_counting_goes_on_with_given_statistics() -> None:
    vlm, samples, statistics = tiny_vlm(MOE).eval(), make_samples(), RoutingStatistics()
    for sample in samples:
        collect_routing(vlm, [sample], batch_size=1, statistics=statistics)
    together = collect_routing(vlm, samples, batch_size=1)
    assert json.dumps(statistics.summary()) == json.dumps(together.summary())


def test_a_folder_gives_three_figures_and_their_numbers(world: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "some_run" / "model", MOE)
    figures = analyze_folder(model, data_folder=world, output_folder=tmp_path / "out", num_samples=8, **OPTIONS)  # type: ignore[arg-type]
    assert [figure.name for figure in figures] == ["expert_load.png", "modality_distribution.png", "token_pathways.png"]
    assert all(figure.stat().st_size > 10_000 for figure in figures)
    routing = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert len(routing["layers"]) == len(routing["expert_distance"]) > 0
    assert routing["pathways"]["image"]["num_tokens"] > 0
    assert len(routing["records"]) == 2


def test_what_cannot_be_analysed_is_refused(world: Path, tmp_path: Path) -> None:
    dense = save_model(tmp_path / "dense", None)
    with pytest.raises(ValueError, match="no MoE layers"):
        analyze_folder(dense, data_folder=world, output_folder=tmp_path, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no MoE layers"):
        collect_routing(tiny_vlm().eval(), make_samples(), batch_size=1)
    sparse = save_model(tmp_path / "sparse", MOE)
    with pytest.raises(ValueError, match="none of nothing"):
        analyze_folder(sparse, data_folder=world, output_folder=tmp_path, records=["nothing.json"], **OPTIONS)  # type: ignore[arg-type]
