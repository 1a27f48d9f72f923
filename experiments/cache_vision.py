"""Write the features of the frozen vision encoder that a training run reads, beside its shards; what is there stays.

python -m experiments.cache_vision experiment=mini/connector_alignment data.vision_cache.enabled=true
"""

from __future__ import annotations

from omegaconf import DictConfig
from tqdm import tqdm

from experiments.instantiate import build, plain
from experiments.program import program
from experiments.run_folder import one_at_a_time
from moevlm.data.sample_cache import has_cache
from moevlm.evaluation.evaluate import choose_device
from moevlm.evaluation.vision_caching import fill_vision_cache


def fill_vision_caches(cfg: DictConfig) -> int:
    """Write every vision cache that this run's datamodule asks for and that is not there.

    Args:
        cfg: the composed config of ``conf/train.yaml``.

    Returns:
        How many were asked for.
    """
    settings = {name: value for name, value in plain(cfg)["cache"].items() if name != "references"}
    name = settings.pop("device")
    device = "cpu" if cfg.trainer.get("accelerator") == "cpu" else str(choose_device(name))
    requests = build(cfg.data).vision_requests()
    for request in requests:
        folder = request.key.folder(request.shards)
        with one_at_a_time(folder / f".part_{settings['part']}_of_{settings['num_parts']}.lock"):
            if has_cache(request.shards, request.key):
                print(f"{folder} is there")
                continue
            with tqdm(desc="vision cache", unit="sample") as bar:
                if not fill_vision_cache(request, device=device, progress=bar.update, **settings):
                    print("this part is written; the cache is complete when every part is")
    return len(requests)


@program("train")
def main(cfg: DictConfig) -> None:
    if not fill_vision_caches(cfg):
        raise ValueError("this run reads no vision cache; set data.vision_cache.enabled=true")


if __name__ == "__main__":
    main()
