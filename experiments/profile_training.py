"""Train as `experiments.train` does, and print where the time went.

python -m experiments.profile_training experiment=mini/instruction_tuning trainer=cpu num_steps=60 run_name=profile
"""

from __future__ import annotations

import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.program import program
from experiments.train import train
from moevlm.benchmarks.shares import describe, sampled


@program("train")
def main(cfg: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    start = time.perf_counter()
    with sampled() as samples:
        train(cfg, Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task))
    print(describe(samples, time.perf_counter() - start))


if __name__ == "__main__":
    main()
