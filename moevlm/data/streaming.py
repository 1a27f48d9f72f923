"""Records streamed from remote shards without an index: WebDataset's pipeline, faults counted and URLs checked."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import webdataset

from moevlm.batch import Record
from moevlm.data.reader import record_from_members
from moevlm.data.rejection import RejectedRecord, Rejection

logger = logging.getLogger(__name__)
SCHEMES = ("http", "https", "hf", "gs", "file")


def expand_urls(urls: str | Sequence[str]) -> list[str]:
    """Brace patterns to URLs, in order.

    WebDataset hands URLs to a shell (curl, gsutil; ``pipe:`` runs anything), so schemes are listed and characters that
    a shell reads are refused.

    Raises:
        ValueError: another scheme, a character that a shell reads, or no URL at all.
    """
    listed = [urls] if isinstance(urls, str) else list(urls)
    expanded = [url for pattern in listed for url in webdataset.shardlists.expand_urls(str(pattern))]
    for url in expanded:
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
        if scheme is not None and scheme.group(1).lower() not in SCHEMES:
            raise ValueError(
                f"shards of scheme {scheme.group(1)!r} are refused: {url}; use a path or one of {', '.join(SCHEMES)}"
            )
        if re.search(r"[\s'\"`$;|&<>\\(){}\[\]*?!]", url) and scheme is not None:
            raise ValueError(f"a shard's URL holds characters that a shell reads: {url}; rename the shard")
    if not expanded:
        raise ValueError("no shards to stream; set shards to URLs")
    return expanded


def stream(
    urls: Sequence[str], *, rank: int = 0, world_size: int = 1, worker: int = 0, num_workers: int = 1
) -> Iterator[Record | Rejection]:
    """One pass over the shards that fall to a worker of a rank, in the order given.

    Damage (a broken tar, a member that is missing) comes as a Rejection, and the next shard goes on.

    Raises:
        ValueError: fewer shards than readers, so that one would have nothing.
    """
    readers = world_size * num_workers
    if len(urls) < readers:
        raise ValueError(
            f"{len(urls)} shards for {world_size} ranks x {num_workers} workers: each needs one; "
            "lower data.num_workers or write smaller shards"
        )
    for url in itertools.islice(urls, rank * num_workers + worker, None, readers):
        faults: list[Exception] = []
        for sample in _open(url, faults.append):
            yield _to_record(sample)
            faults_now, faults[:] = list(faults), []
            yield from (Rejection(url, "broken_shard", str(fault)) for fault in faults_now)
        yield from (Rejection(url, "broken_shard", str(fault)) for fault in faults)


def _open(url: str, note: Callable[[Exception], Any]) -> Iterator[dict[str, Any]]:
    def handler(error: Exception) -> bool:
        logger.warning("broken tar: %s (%s); its other samples are kept; build or copy it again", url, error)
        note(error)
        return False  # what follows damage in a tar cannot be trusted

    # raw bytes only: WebDataset's own decoders would unpickle members
    yield from webdataset.WebDataset(
        [url], shardshuffle=False, nodesplitter=_keep_all, workersplitter=_keep_all, handler=handler, empty_check=False
    )


def _keep_all(urls: Iterator[Any]) -> Iterator[Any]:
    return urls


def _to_record(sample: dict[str, Any]) -> Record | Rejection:
    members = {name: data for name, data in sample.items() if not name.startswith("__") and isinstance(data, bytes)}
    try:
        return record_from_members(sample["__key__"], members)
    except RejectedRecord as rejected:
        return Rejection(sample["__key__"], rejected.reason, rejected.detail)
