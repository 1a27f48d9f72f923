"""What every family of data shares: sources, reading plan, ranks, steps, resume."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningDataModule
from torch.utils.data import Dataset

from datamodules.caches import SampleCaches
from datamodules.plans import lengths_of, mixture_of
from datamodules.position import check_position
from datamodules.rejections import RejectionLog
from datamodules.sources import Source, parse_sources
from datamodules.steps import Encode, PackedStepDataset, Step, StepDataset, StepLoader
from datamodules.streams import StreamingSteps
from datamodules.teacher_view import add_teacher_view
from datamodules.vision_caches import VisionCaches
from moevlm.batch import VocabularyMatch
from moevlm.data.cache import ShardCache
from moevlm.data.lengths import UNUSABLE
from moevlm.data.packing import PackedPlan
from moevlm.data.plan import MixturePlan, SequentialPlan, chunk_positions, rank_positions
from moevlm.data.reader import IndexedShards
from moevlm.data.records import RecordFile
from moevlm.data.urls import expand_urls
from moevlm.evaluation.teacher_caching import CacheRequest
from moevlm.evaluation.vision_caching import VisionRequest
from moevlm.preprocessing.alignment import match_vocabularies
from moevlm.preprocessing.processor import Processor

logger = logging.getLogger(__name__)
READERS = ("indexed", "streaming")
MIXTURES = ("weighted", "balanced")


class VLMDataModule(LightningDataModule):
    """Steps of packed micro-batches, in an order that is a function of (seed, position).

    A loader item is one optimizer step of this rank: ``list[VLMBatch]``. Samples consumed are
    ``trainer.global_step * global_batch_size``, so a run resumes with any number of ranks and workers.

    Args:
        sources: training sources, each ``{name, shards, weight}``; weights of any scale, by default sizes.
        processor: tokenizes and transforms.
        num_steps: length of the training loader, the whole run's: ``trainer.max_steps``.
        global_batch_size: samples of a step over all ranks (a preference pair is one sample).
        micro_batch_size: samples of one micro-batch of one rank.
        validation_sources: read in order, without shuffling.
        num_validation_samples: shared evenly by the validation sources; None takes all.
        teacher_processor: its image transform makes the view "teacher", when it differs from the processor's.
        cross_tokenizer: the teacher has another tokenizer: every sample is encoded for both, and aligned.
        teacher_cache: read the teacher's rows from a cache beside the shards (experiments.cache_teacher writes it):
            ``{teacher: model folder, kind: top_k | sampled | hidden, width, proposal, dtype, seed, vocab_size}``.
        vision_cache: read the features of a frozen vision encoder in place of pixels, see `VisionCaches`.
        num_workers: loader processes of each rank.
        max_rejected_fraction: of the samples read; beyond it the run stops.
        rejected_folder: where ``rejected.jsonl`` names the samples that were replaced.
        mixture: `weighted` by the sources' weights, or `balanced`: sources by turns, equally many in every batch.
        block_shards: shards whose samples are shuffled together.
        pack_tokens: tokens of a micro-batch, visual tokens included. A micro-batch is then as many samples as fit, and
            a step has ``global_batch_size / micro_batch_size`` of them over all ranks, whatever they hold.
        cache_folder, cache_gib: where shards at URLs are kept on this machine (by default in the user's cache folder),
            and how much of them.
        reader: `indexed`, or `streaming` for remote shards without an index (then resume is not exact).
        allow_pipe: with ``reader=streaming``, read shards ``pipe:COMMAND``; the command runs in a shell.
        rank, world_size: asked of the trainer when None.
    """

    def __init__(
        self,
        sources: Iterable[Mapping[str, Any]],
        processor: Processor,
        *,
        num_steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        validation_sources: Iterable[Mapping[str, Any]] = (),
        num_validation_samples: int | None = None,
        teacher_processor: Processor | None = None,
        cross_tokenizer: bool = False,
        teacher_cache: Mapping[str, Any] | None = None,
        vision_cache: Mapping[str, Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        max_rejected_fraction: float = 0.05,
        rejected_folder: str | Path | None = None,
        mixture: str = "weighted",
        block_shards: int = 8,
        pack_tokens: int | None = None,
        cache_folder: str | Path | None = None,
        cache_gib: float = 200.0,
        reader: str = "indexed",
        allow_pipe: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if reader not in READERS:
            raise ValueError(f"reader must be one of {', '.join(READERS)}, got {reader!r}; set data.reader")
        if mixture not in MIXTURES or (mixture == "balanced" and reader == "streaming"):
            raise ValueError(
                f"mixture must be one of {', '.join(MIXTURES)}, and balanced needs reader=indexed; got {mixture!r} "
                f"with reader={reader}; set data.mixture"
            )
        self.mixture = mixture
        for name, value in {"num_steps": num_steps, "micro_batch_size": micro_batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; set data.{name}")
        self.sources = parse_sources(sources, "data.sources")
        self.validation_sources = parse_sources(validation_sources, "data.validation_sources")
        self.processor = add_teacher_view(processor, teacher_processor, cross_tokenizer=cross_tokenizer)
        self.caches = SampleCaches(teacher_cache, None, self.processor)
        self.vision = VisionCaches(vision_cache, self.processor)
        self.num_steps, self.seed = num_steps, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.num_validation_samples = num_validation_samples
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.max_rejected_fraction, self.rejected_folder = max_rejected_fraction, rejected_folder
        self.block_shards, self.reader = block_shards, reader
        self.allow_pipe, self.pack_tokens = allow_pipe, pack_tokens
        self.cache = ShardCache(cache_folder, max_gib=cache_gib)
        self._rows: PackedPlan | None = None
        self._packing: list[int] = []  # of a checkpoint: its row's window, and the rows before that
        self._rank, self._world_size = rank, world_size
        self.train_rejections: RejectionLog | None = None  # of the training loader, once it is made
        self.train_loader: StepLoader | None = None
        self._samples_consumed = 0  # where a run without a trainer stands
        self._opened: dict[str, IndexedShards | RecordFile] = {}
        self._split_global_batch(world_size or 1)

    sequences_per_sample = 1

    def encoder(self) -> Encode:
        """How a record becomes sequences; each family has its own."""
        raise NotImplementedError

    @property
    def provides(self) -> frozenset[str]:
        """What the batches carry of frozen models, from caches; a stage need not build those."""
        return self.caches.provides | self.vision.provides

    @property
    def vocabulary_match(self) -> VocabularyMatch | None:
        """The tokens that the student's and a teacher's own tokenizer share; None when they have one in common."""
        teacher = self.processor.teacher
        return None if teacher is None else match_vocabularies(self.processor.tokenizer, teacher.tokenizer)

    def vision_requests(self) -> list[VisionRequest]:
        """The vision caches that training and validation read, whether they are there or not."""
        return self.vision.requests([*self.sources, *self.validation_sources])

    def cache_requests(self) -> list[CacheRequest]:
        """The caches that training and validation read, whether they are there or not."""
        return self.caches.requests([*self.sources, *self.validation_sources])

    @property
    def rank(self) -> int:
        if self._rank is not None:
            return self._rank
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        if self._world_size is not None:
            return self._world_size
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def samples_consumed(self) -> int:
        """Samples that the optimizer has seen, over all ranks."""
        return self._samples_consumed if self.trainer is None else self.trainer.global_step * self.global_batch_size

    def setup(self, stage: str | None = None) -> None:
        """Check how the global batch splits, and open the sources, so that a fault shows before a model runs."""
        self._split_global_batch(self.world_size)
        max_steps = self.trainer.max_steps if self.trainer is not None else -1
        if self.pack_tokens is not None and self.reader == "streaming":
            raise ValueError("packing needs samples by number; set data.reader=indexed or data.pack_tokens=null")
        if stage == "fit" and max_steps > self.num_steps:
            raise ValueError(f"trainer.max_steps={max_steps} exceeds data.num_steps={self.num_steps}; make them equal")
        for source in self.validation_sources:
            self._open(source)
        for source in self.sources if stage in (None, "fit") else []:
            if self.reader == "indexed":
                self._open(source)
            else:
                expand_urls(source.shards, allow_pipe=self.allow_pipe)

        if self.provides and self.reader == "streaming":
            raise ValueError(
                "a cache needs samples by number; set data.reader=indexed, or data.teacher_cache=null and "
                "data.vision_cache=null"
            )
        for sources in (
            (self.sources, self.validation_sources) if stage in (None, "fit") else (self.validation_sources,)
        ):
            self.caches.open(sources)
            self.vision.open(sources)

    def train_dataloader(self) -> StepLoader:
        """The steps from where the run stands to `num_steps`; its length is `num_steps`."""
        if not self.sources:
            raise ValueError("nothing to train on; set data.sources")
        dataset = self._streaming_steps() if self.reader == "streaming" else self._indexed_steps()
        self.train_rejections = self._rejections("train")
        self.train_rejections.forget_after(self.samples_consumed)
        start = lambda: self.samples_consumed // self.global_batch_size  # noqa: E731 - asked when the first step is
        self.train_loader = self._loader(dataset, self.train_rejections, num_steps=self.num_steps, start=start)
        return self.train_loader

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """The validation samples in order, one micro-batch of each rank at a time; nothing is drawn at random."""
        if not self.validation_sources:
            return []
        return self.sequential_loader(self.validation_sources, split="validation")

    def sequential_loader(self, sources: Sequence[Source], *, split: str) -> StepLoader:
        """Every rank gets equally many items; the last may be smaller, and what is fewer than the ranks is dropped."""
        readers = [self._open(source) for source in sources]
        plan = SequentialPlan([len(reader) for reader in readers], max_samples=self.num_validation_samples)
        chunk = self.micro_batch_size * self.world_size
        num_items, rest = divmod(len(plan), chunk)
        if rest >= self.world_size:
            num_items += 1
        elif rest:
            logger.warning("%s: the last %d of %d samples are left out, fewer than the ranks", split, rest, len(plan))
        total, rank, world_size = len(plan), self.rank, self.world_size
        dataset = StepDataset(
            readers,
            [source.name for source in sources],
            plan,
            self.encoder(),
            positions=partial(chunk_positions, chunk=chunk, total=total, rank=rank, world_size=world_size),
            samples_per_step=chunk,
            micro_batch_size=self.micro_batch_size,
            attach=self.caches.open(sources),
            features=self.vision.open(sources),
            pixels=self.vision.pixels,
        )
        return self._loader(dataset, self._rejections(split), num_steps=num_items)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's hook: a training step must stand where the optimizer does."""
        if self.trainer is not None and self.trainer.training:
            check_position(batch, self.samples_consumed)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        state = {"samples_consumed": self.samples_consumed, "fingerprint": self.fingerprint()}
        if self._rows is not None:
            state["packing"] = list(self._rows.window_of(self.samples_consumed // self.micro_batch_size))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume; refuses a checkpoint whose order of samples was another.

        Raises:
            ValueError: names what differs.
        """
        saved, current = state_dict["fingerprint"], self.fingerprint()
        differing = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
        if differing:
            listed = "; ".join(f"{name} was {saved.get(name)}, is {current.get(name)}" for name in differing)
            raise ValueError(
                f"the checkpoint's data is not this run's: {listed}; start a new run or restore the settings"
            )
        self._samples_consumed = int(state_dict["samples_consumed"])
        self._packing = state_dict.get("packing", [])

    def fingerprint(self) -> dict[str, Any]:
        """What the reading order depends on, in plain values; not the number of ranks or workers."""
        common = {"reader": self.reader, "seed": self.seed, "global_batch_size": self.global_batch_size}
        if self.reader == "streaming":
            return {**common, "sources": [[source.name, str(source.shards)] for source in self.sources]}
        shares = [[source.weight, source.epochs, source.tokens] for source in self.sources]
        digests = [[source.name, self._open(source).digest, *share] for source, share in zip(self.sources, shares)]
        common |= {"block_shards": self.block_shards, "sources": digests}
        common |= {"mixture": self.mixture} if self.mixture != "weighted" else {}
        if self.pack_tokens is not None:
            common |= {"pack_tokens": self.pack_tokens, "samples_per_row": self.micro_batch_size}
        return common

    def _indexed_steps(self) -> StepDataset:
        readers = [self._open(source) for source in self.sources]
        plan = mixture_of(
            self.sources,
            readers,
            self.processor,
            seed=self.seed,
            block_shards=self.block_shards,
            balanced=self.mixture == "balanced",
        )
        names, size = [source.name for source in self.sources], self.global_batch_size
        settings: dict[str, Any] = {
            "samples_per_step": size,
            "micro_batch_size": self.micro_batch_size,
            "attach": self.caches.open(self.sources),
            "features": self.vision.open(self.sources),
            "pixels": self.vision.pixels,
        }
        if self.pack_tokens is not None:
            size //= self.micro_batch_size
            self._rows = self._packed(plan)
            settings["rows"] = self._rows
        take = partial(rank_positions, global_batch_size=size, rank=self.rank, world_size=self.world_size)
        kind = StepDataset if self.pack_tokens is None else PackedStepDataset
        return kind(readers, names, plan, self.encoder(), positions=take, **settings)

    def _packed(self, plan: MixturePlan) -> PackedPlan:
        assert self.pack_tokens is not None
        lengths = []
        for source in self.sources:
            tokens = lengths_of(source, self.processor)
            tokens = np.where(tokens > self.processor.max_length, UNUSABLE, tokens)  # rejected, or cut to fit
            lengths.append(np.where(tokens == UNUSABLE, UNUSABLE, tokens * self.sequences_per_sample))
        rows = PackedPlan(plan, lengths, budget=self.pack_tokens)
        if self._packing:
            rows.start_at(*self._packing)
        return rows

    def _streaming_steps(self) -> StreamingSteps:
        if self.samples_consumed:
            logger.warning("reader=streaming resumes at the start of a shard order of its own, not at the exact sample")
        return StreamingSteps(
            self.sources,
            self.encoder(),
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            start=self.samples_consumed // self.global_batch_size,
            allow_pipe=self.allow_pipe,
        )

    def _open(self, source: Source) -> IndexedShards | RecordFile:
        key = str(source)
        if key not in self._opened:
            self._opened[key] = source.open(self.cache)
        return self._opened[key]

    def _loader(self, dataset: Dataset[Step], rejections: RejectionLog, **options: Any) -> StepLoader:
        workers, pin_memory = self.num_workers, self.pin_memory
        return StepLoader(dataset, rejections, num_workers=workers, pin_memory=pin_memory, **options)

    def _rejections(self, split: str) -> RejectionLog:
        return RejectionLog(
            self.rejected_folder, max_rejected_fraction=self.max_rejected_fraction, rank=self.rank, split=split
        )

    def _split_global_batch(self, world_size: int) -> None:
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size < 1 or self.global_batch_size % per_pass:
            raise ValueError(
                f"global_batch_size must be a multiple of micro_batch_size * world_size = {self.micro_batch_size} * "
                f"{world_size}, got {self.global_batch_size}; set data.global_batch_size"
            )
