"""The check that the data stands where the optimizer does."""

from __future__ import annotations

from collections.abc import Sequence

from moevlm.batch import VLMBatch


def check_position(step: Sequence[VLMBatch], samples_consumed: int) -> None:
    """Refuse a step whose batches stand at another position of the plan than the run has reached.

    Lightning can restart a loader while its counters go on (for one: a look at `trainer.estimated_stepping_batches`
    before a checkpoint is restored), which would train on the same samples twice, in silence.

    Raises:
        RuntimeError: the positions differ.
    """
    for batch in step:
        if batch.position != samples_consumed:
            raise RuntimeError(
                f"the data stands at sample {batch.position}, the optimizer at {samples_consumed}: the loader was not "
                "resumed with the run; let the datamodule make the loader, after the checkpoint is restored"
            )
