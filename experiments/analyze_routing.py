"""Draw what the routers of a sparse model do: expert load, modalities, token pathways.

python -m experiments.analyze_routing model_folder=outputs/demo/moe_tuning data_folder=outputs/world
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from experiments.evaluate import find_model
from experiments.instantiate import plain
from experiments.program import program
from experiments.tracking import show_figures
from moevlm.analysis.explain import analyze_folder


@program("analyze_routing")
def main(cfg: DictConfig) -> None:
    settings = plain(cfg)
    model = find_model(settings.pop("model_folder"))
    output = Path(settings.pop("output_folder") or model.parent / "figures")
    figures = analyze_folder(model, output_folder=output, **settings)
    for path in (*figures, output / "routing.json"):
        print(f"wrote {path}")
    if show_figures(model.parent, figures):
        print(f"shown in W&B with the run {model.parent}")


if __name__ == "__main__":
    main()
