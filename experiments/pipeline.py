"""Run a chain of stages from one config: each resumable, each stage's model the next one's start.

python -m experiments.pipeline pipeline=demo
python -m experiments.pipeline pipeline=distillation_table seeds=[0,1,2] jobs=8
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.chain import run_stages
from experiments.forgetting import forgetting_chain
from experiments.instantiate import plain
from experiments.jobs import chain_jobs
from experiments.make_world import prepare_world
from experiments.parallel import ParallelRun
from experiments.program import program
from experiments.run_folder import write_json
from experiments.seed_table import write_table
from experiments.summary import evaluate_chain, explain_chain, report_chain


def run_pipeline(cfg: DictConfig) -> dict[str, Any]:
    """Prepare data, run every stage, evaluate, explain, and write ``summary.json`` and the report.

    With ``seeds`` all of that for each, and a table over them. With ``jobs`` above 1 whatever needs nothing of each
    other runs at the same time, of all seeds.

    Returns:
        The summary, of the first seed where there are several.

    Raises:
        ValueError: two stages share a name, a stage starts from one that does not stand before it, seeds share a
            folder; or jobs failed, after the others are done.
    """
    chains = chains_of(cfg)
    if chains[0]["world"] is not None:
        prepare_world(Path(cfg.data_root), **chains[0]["world"])
    failures: dict[str, str] = {}
    if cfg.jobs != 1:
        failures = ParallelRun([job for chain in chains for job in chain_jobs(chain)], cfg.jobs).run()
    complete = [chain for chain in chains if not any(name.startswith(f"{chain['name']}/") for name in failures)]
    summaries = [finish_chain(settings) for settings in complete]
    if failures:
        told = "\n".join(f"  {name}: {message}" for name, message in failures.items())
        raise ValueError(f"{len(failures)} jobs failed; the others are complete\n{told}")
    if cfg.seeds is not None:
        folders = [Path(chain["output_root"]) / chain["name"] for chain in chains]
        print(f"wrote {write_table(folders, folders[0].parent / 'table.md')}")
    return summaries[0]


def chains_of(cfg: DictConfig) -> list[dict[str, Any]]:
    """The settings of the chain for every seed."""
    chains = []
    for seed in [cfg.seed] if cfg.seeds is None else cfg.seeds:
        of_seed = cfg.copy()
        of_seed.seed = seed
        chains.append(plain(of_seed))
    names = {chain["name"] for chain in chains}
    if not chains or len(names) < len(chains):
        raise ValueError(
            f"every seed needs a folder of its own, got seeds {cfg.seeds} and name {cfg.name!r}; "
            "set seeds to different numbers, and name to one with ${seed} in it"
        )
    return chains


def finish_chain(settings: dict[str, Any]) -> dict[str, Any]:
    """Run whatever a chain still lacks, one thing after another, and say what came of it."""
    root = Path(settings["output_root"]) / settings["name"]
    results = run_stages(settings)
    trained = {name: result for name, result in results.items() if "program" not in result}
    summary: dict[str, Any] = {"stages": [stage_row(name, result) for name, result in trained.items()]}
    summary["programs"] = {name: result for name, result in results.items() if "program" in result}
    summary |= evaluate_chain(settings, root)
    summary |= explain_chain(settings, root)
    summary["forgetting"] = forgetting_chain(settings, root)
    summary["report"] = report_chain(root, summary)
    write_json(root / "summary.json", summary)
    print(f"wrote {root / 'summary.json'} and {summary['report']}")
    return summary


def stage_row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """What ``summary.json`` says of a stage."""
    keys = ("steps", "seconds", "peak_memory_gib", "loss_first", "loss_last", "checkpoint")
    return {"name": name} | {key: result[key] for key in keys if key in result}


@program("pipeline")
def main(cfg: DictConfig) -> None:
    run_pipeline(cfg)


if __name__ == "__main__":
    main()
