"""Time a part of the suite beside its peers and its floor, after checking that all compute the same.

python -m experiments.benchmark suite=moe_layer
"""

from __future__ import annotations

from omegaconf import DictConfig

from experiments.instantiate import plain
from experiments.program import program
from experiments.run_folder import commit
from moevlm.benchmarks.suites import run_suite


@program("benchmark")
def main(cfg: DictConfig) -> None:
    run_suite(**plain(cfg), commit=commit())


if __name__ == "__main__":
    main()
