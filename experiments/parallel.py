"""Several jobs of one or more chains at a time, each in a process of its own; what needs another waits for it.

The jobs leave what a sequential run leaves, in the same folders: that run then finds everything finished.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import wait

from experiments.jobs import Job, last_step, urgency
from experiments.workers import Worker, environments

REPORT_SECONDS = 30.0
"""Time between two lines that say how far the running jobs are."""


class ParallelRun:
    """The jobs at hand, and who does them."""

    def __init__(self, jobs: Sequence[Job], num_workers: int) -> None:
        """Keep the jobs; processes start when there is something to do for them.

        Args:
            jobs: each behind those it needs.
            num_workers: processes at a time.

        Raises:
            ValueError: no process, or a job needs one that does not stand before it.
        """
        if num_workers < 1:
            raise ValueError(f"jobs must be at least 1, got {num_workers}; set jobs")
        seen: set[str] = set()
        for job in jobs:
            if missing := set(job.needs) - seen:
                raise ValueError(f"{job.name} needs {sorted(missing)}, which stands not before it; set pipeline.stages")
            seen.add(job.name)
        behind = urgency(jobs)
        self.waiting = sorted(jobs, key=lambda job: -behind[job.name])  # a stable sort: else in the chain's order
        self.num_jobs, self.done, self.failures = len(jobs), set[str](), dict[str, str]()
        self.free_environments = environments(num_workers)
        self.workers: list[Worker] = []
        self.began: dict[str, float] = {}

    def run(self) -> dict[str, str]:
        """Do all jobs; one that fails hides no other, except those that need it.

        Returns:
            What went wrong, by job.
        """
        try:
            next_report = time.monotonic() + REPORT_SECONDS
            while self._hand_out():
                busy = [worker.connection for worker in self.workers if worker.job is not None]
                for connection in wait(busy, timeout=max(0.0, next_report - time.monotonic())):
                    self._take_in(next(worker for worker in self.workers if worker.connection is connection))
                if time.monotonic() >= next_report:
                    self._report()
                    next_report = time.monotonic() + REPORT_SECONDS
        finally:
            for worker in sorted(self.workers, key=lambda worker: worker.job is None):
                worker.stop()
        return self.failures

    def _hand_out(self) -> bool:
        """Give ready jobs to free workers; whether any job is running then."""
        for job in list(self.waiting):
            if failed := [name for name in job.needs if name in self.failures]:
                self.waiting.remove(job)
                self.failures[job.name] = f"not run: {failed[0]} failed"
            elif self.done.issuperset(job.needs) and (worker := self._free_worker()) is not None:
                self.waiting.remove(job)
                self.began[job.name] = time.monotonic()
                worker.give(job)
        return any(worker.job is not None for worker in self.workers)

    def _free_worker(self) -> Worker | None:
        for worker in self.workers:
            if worker.job is None:
                return worker
        if not self.free_environments:
            return None
        self.workers.append(Worker(self.free_environments.pop(0)))
        return self.workers[-1]

    def _take_in(self, worker: Worker) -> None:
        job = worker.job
        assert job is not None
        is_done, message = worker.answer()
        if is_done:
            self.done.add(job.name)
        else:
            self.failures[job.name] = f"{message} (see {job.folder / 'log.txt'})"
        if not worker.process.is_alive():
            self.workers.remove(worker)
            self.free_environments.append(worker.environment)
        state = "" if is_done else "FAILED: "
        seconds = time.monotonic() - self.began[job.name]
        count = f"[{len(self.done) + len(self.failures)}/{self.num_jobs}]"
        print(f"{count} {job.name} ({seconds:.0f} s) {state}{message}".rstrip(), flush=True)

    def _report(self) -> None:
        running = [worker.job for worker in self.workers if worker.job is not None]
        notes = [f"{job.name}{'' if (step := last_step(job)) is None else f' step {step}'}" for job in running]
        print(f"    running {len(running)}, waiting {len(self.waiting)}: {', '.join(notes)}", flush=True)
