"""What a chain is made of: stages, evaluations and losses by domain as jobs, each with what must be done before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.chain import check_chain, needs_of, run_stage
from experiments.forgetting import pairs_of, run_losses
from experiments.run_folder import read_json
from experiments.summary import evaluate_model, evaluations

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One piece of a chain's work, which any process can do: its inputs and results are in folders."""

    name: str  # unique among all chains at hand: <chain>/<stage>
    kind: str  # a key of KINDS
    target: str  # the stage, or the model evaluated
    settings: dict[str, Any]  # of the whole chain
    folder: Path  # whose log.txt takes what the job prints
    needs: tuple[str, ...] = ()  # names of jobs

    def run(self) -> str:
        """Do it, or find it done; called while a Hydra is open.

        Returns:
            What there is to say of its result; may be empty.
        """
        return KINDS[self.kind](self.settings, self.target)


def chain_jobs(settings: dict[str, Any]) -> list[Job]:
    """The jobs of one chain, each behind those it needs."""
    check_chain(settings["stages"])
    root = Path(settings["output_root"]) / settings["name"]
    prefix = f"{settings['name']}/"
    jobs = [
        Job(
            prefix + stage["name"],
            "stage",
            stage["name"],
            settings,
            root / stage["name"],
            tuple(sorted(prefix + name for name in needs_of(stage, settings))),
        )
        for stage in settings["stages"]
    ]
    stages = {stage["name"] for stage in settings["stages"]}
    for name, (_, stage, _) in evaluations(settings, root).items():
        needs = (prefix + stage,) if stage in stages else ()
        jobs.append(Job(f"{prefix}eval/{name}", "evaluation", name, settings, root / "eval" / name, needs))
    measured = {name for pair in pairs_of(settings).items() for name in pair}
    for name in (stage["name"] for stage in settings["stages"]):
        if name in measured:
            folder = root / name
            jobs.append(Job(f"{prefix}losses/{name}", "losses", name, settings, folder, (prefix + name,)))
    return jobs


def urgency(jobs: Sequence[Job]) -> dict[str, int]:
    """How many jobs the longest line of jobs that wait for each one has: who has many behind it goes first."""
    behind = {job.name: 0 for job in jobs}
    for job in reversed(jobs):  # each stands behind what it needs
        for name in job.needs:
            behind[name] = max(behind[name], behind[job.name] + 1)
    return behind


def _run_stage(settings: Settings, name: str) -> str:
    stage = next(stage for stage in settings["stages"] if stage["name"] == name)
    result = run_stage(stage, dict(settings), Path(settings["output_root"]) / settings["name"] / name)
    return f"val/loss {result['loss_first']:.4f} -> {result['loss_last']:.4f}" if "loss_last" in result else ""


def _run_evaluation(settings: Settings, name: str) -> str:
    root = Path(settings["output_root"]) / settings["name"]
    model, _, options = evaluations(settings, root)[name]
    scores = evaluate_model(model, root / "eval" / name, settings["data_root"], options)
    return ", ".join(f"{key} {row['accuracy']:.3f}" for key, row in scores.items() if "accuracy" in row)


def _run_losses(settings: Settings, name: str) -> str:
    losses = run_losses(Path(settings["output_root"]) / settings["name"] / name, settings["forgetting"])
    return ", ".join(f"{key} {loss:.3f}" for key, loss in losses.items())


KINDS: dict[str, Callable[[Settings, str], str]] = {
    "stage": _run_stage,
    "evaluation": _run_evaluation,
    "losses": _run_losses,
}


def last_step(job: Job) -> int | None:
    """The step that a training job has come to; None where it is no training or has not begun."""
    record = job.folder / "metrics.jsonl"
    if job.kind != "stage" or not record.exists() or read_json(job.folder / "result.json"):
        return None
    with record.open("rb") as stream:
        stream.seek(max(0, record.stat().st_size - 65536))
        lines = stream.read().decode(errors="replace").splitlines()
    steps = [line.partition('"step": ')[2].partition(",")[0] for line in lines]
    return max((int(step) for step in steps if step.isdigit()), default=None)
