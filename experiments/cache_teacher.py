"""Write the teacher caches that a training run reads, beside its shards; what is there already stays.

python -m experiments.cache_teacher experiment=distillation/offline
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from experiments.instantiate import build, plain
from experiments.program import program
from experiments.run_folder import one_at_a_time
from moevlm.data.reader import IndexedShards
from moevlm.data.sample_cache import has_cache
from moevlm.evaluation.evaluate import choose_device
from moevlm.evaluation.teacher_caching import CacheRequest, fill_cache

REFERENCES = ("auto", "always")
NUM_VALIDATIONS = 2  # of a run: at its start and at its end


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
    """Write a preference run's reference log-probabilities, two numbers a pair, where they are missing and worth it.

    Before the ranks start, on one device: one pass of the reference over the pairs. A run that reads fewer pairs than
    that is better off with the reference beside it (``cache.references=auto``).
    """
    if "references" not in cfg.data:
        return
    if cfg.cache.references not in REFERENCES:
        known = ", ".join(REFERENCES)
        raise ValueError(f"cache.references must be one of {known}, got {cfg.cache.references!r}; set cache.references")
    if cfg.cache.references == "always" or _is_worth_it(build(cfg.data)):
        fill_caches(cfg, only="reference")


def leave_missing_references(cfg: DictConfig) -> None:
    """Have the stage run its reference where no cache was written; every rank finds the same."""
    if "references" not in cfg.data or cfg.data.reference is None:
        return
    requests = [request for request in build(cfg.data).cache_requests() if request.key.kind == "reference"]
    if not all(has_cache(request.shards, request.key) for request in requests):
        cfg.data.reference = None


def _is_worth_it(datamodule: Any) -> bool:
    """Whether the run reads as many pairs as the missing caches hold."""
    requests = [request for request in datamodule.cache_requests() if request.key.kind == "reference"]
    sizes = [len(IndexedShards(one.shards)) for one in requests if not has_cache(one.shards, one.key)]
    validated = sum(len(IndexedShards(source.shards)) for source in datamodule.validation_sources)
    if datamodule.num_validation_samples is not None:
        validated = min(validated, datamodule.num_validation_samples)
    num_models = max(len(datamodule.caches.references), 1)
    reads = num_models * (datamodule.num_steps * datamodule.global_batch_size + NUM_VALIDATIONS * validated)
    if sum(sizes) > reads:
        print(f"no reference cache: it takes {sum(sizes)} passes, the run {reads}; cache.references=always writes it")
    return sum(sizes) <= reads


def _fill(request: CacheRequest, cfg: DictConfig) -> None:
    settings = plain(cfg)["cache"]
    device = "cpu" if cfg.trainer.get("accelerator") == "cpu" else str(choose_device(settings.pop("device")))
    settings.pop("device", None)
    settings.pop("references")
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
