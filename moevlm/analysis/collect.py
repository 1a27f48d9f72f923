"""Run a model over samples and count what its routers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moevlm.analysis.statistics import RoutingStatistics
from moevlm.batch import DEFAULT_VIEW, EncodedSample
from moevlm.models.vlm import VLM
from moevlm.preprocessing.collate import pack


@torch.no_grad()
def collect_routing(
    vlm: VLM,
    samples: Sequence[EncodedSample],
    *,
    batch_size: int,
    statistics: RoutingStatistics | None = None,
    view: str = DEFAULT_VIEW,
    on_batch: Callable[[int], object] | None = None,
) -> RoutingStatistics:
    """Routing of whole conversations, gold answers included, so that every token is counted once.

    Generation would count the model's own answers instead, and its padding never (it reaches no router either way).

    Args:
        vlm: a sparse model in eval mode (nothing is dropped then, whatever the capacity); its device is used.
        samples: encoded conversations.
        batch_size: samples that run together.
        statistics: counts to go on with; None starts anew.
        view: which of the samples' image transforms the model sees.
        on_batch: called with the number of samples after each batch.

    Raises:
        ValueError: a dense model.
    """
    found = statistics if statistics is not None else RoutingStatistics()
    device = next(vlm.parameters()).device
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]
        output = vlm(pack(chosen).to(device), view=view)
        found.add(output.routings, output.segments)
        if on_batch is not None:
            on_batch(len(chosen))
    return found
