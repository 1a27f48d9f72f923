"""Write the teacher caches that a training run reads, beside its shards; what is there already stays.

python -m experiments.cache_teacher experiment=mini/distillation/offline
"""

from __future__ import annotations

from omegaconf import DictConfig
from tqdm import tqdm

from experiments.instantiate import build, plain
from experiments.program import program
from experiments.run_folder import one_at_a_time
from moevlm.data.teacher_cache import has_cache
from moevlm.evaluation.evaluate import choose_device
from moevlm.evaluation.teacher_caching import CacheRequest, fill_cache


def fill_caches(cfg: DictConfig, *, only: str | None = None) -> int:
    """Write every cache that this run's datamodule asks for and that is not there.

    Args:
        cfg: the composed config of ``conf/train.yaml``.
        only: one kind of cache; None for all.

    Returns:
        How many were asked for.
    """
    requests = [request for request in build(cfg.data).cache_requests() if only in (None, request.key.kind)]
    settings = cfg.cache
    for request in requests:
        folder = request.key.folder(request.shards)
        # seeds that train at the same time ask for the same cache: one writes it, the others wait
        with one_at_a_time(folder / f".part_{settings.part}_of_{settings.num_parts}.lock"):
            if has_cache(request.shards, request.key):
                print(f"{folder} is there")
            else:
                _fill(request, cfg)
    return len(requests)


def prepare_references(cfg: DictConfig) -> None:
    """Write a preference run's reference log-probabilities, two numbers a pair, where they are missing.

    Before the ranks start, on one device: one pass of the reference over the pairs, which training would need anyway.
    """
    if "references" in cfg.data:
        fill_caches(cfg, only="reference")


def _fill(request: CacheRequest, cfg: DictConfig) -> None:
    settings = plain(cfg)["cache"]
    device = "cpu" if cfg.trainer.get("accelerator") == "cpu" else str(choose_device(settings.pop("device")))
    settings.pop("device", None)
    with tqdm(desc=f"{request.key.kind} cache", unit="sample") as bar:
        is_complete = fill_cache(request, device=device, progress=bar.update, **settings)
    if not is_complete:
        print("this part is written; the cache is complete when every part is")


@program("train")
def main(cfg: DictConfig) -> None:
    if not fill_caches(cfg):
        raise ValueError("this run reads no cache; set data.teacher_cache or choose a preference experiment")


if __name__ == "__main__":
    main()
