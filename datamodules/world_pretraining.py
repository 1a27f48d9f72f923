"""Training data of the miniature world's own backbones: images with patch labels, and documents.

Training scenes come from the train split only, so no validation or test scene can reach a backbone
(`moevlm.world.scenes.split_of` is a function of the scene itself). Step k is a pure function of (seed, k), so a resumed
run sees what an unbroken one sees.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from datamodules.steps import StepSampler
from moevlm.batch import DEFAULT_VIEW, EncodedSample, Record, Turn, VLMBatch
from moevlm.data.plan import BlockShuffle, rank_positions
from moevlm.preprocessing.collate import pack
from moevlm.preprocessing.processor import Processor
from moevlm.preprocessing.templates import IMAGE_TAG
from moevlm.world.documents import PATCH_WORD_CHOICES, patch_words, pretraining_conversation, text_only_conversation
from moevlm.world.ground_truth import ATTRIBUTES, patch_labels
from moevlm.world.rendering import render
from moevlm.world.scenes import Scene, iterate_scenes


class _Steps(Dataset[Any]):
    """Item k is the whole optimizer step k of this rank."""

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"global_batch_size={batch_size} is not a multiple of {world_size} ranks; set global_batch_size"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.order = BlockShuffle([num_samples], seed=seed)

    def samples_of(self, step: int) -> list[int]:
        """This rank's sample ids of a step: one shuffled epoch after another, position = samples consumed."""
        positions = rank_positions(step, global_batch_size=self.batch_size, rank=self.rank, world_size=self.world_size)
        return [self.order.sample(*divmod(position, self.num_samples)) for position in positions]


class SceneImages(_Steps):
    """Steps of ``{"images": [N, 3, H, W], "labels": {attribute: [N, P]}}``."""

    def __init__(self, pixels: np.ndarray, labels: dict[str, np.ndarray], **plan: Any) -> None:
        super().__init__(len(pixels), **plan)
        self.pixels, self.labels = pixels, labels

    def __getitem__(self, step: int) -> dict[str, Any]:
        ids = self.samples_of(step)
        images = torch.from_numpy(self.pixels[ids]).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # mean 0.5, std 0.5
        return {"images": images, "labels": {name: torch.from_numpy(self.labels[name][ids]) for name in ATTRIBUTES}}


class SceneDocuments(_Steps):
    """Steps of one packed batch of text. Answers alone are supervised: no one can predict the scene that is told.

    A share of the scenes is told as a picture in words, patch by patch, where an image will stand later
    (`moevlm.models.told_pictures`).
    """

    def __init__(
        self, scenes: list[Scene], processor: Processor, *, picture_fraction: float = 0.0, grid: int = 6, **plan: Any
    ) -> None:
        super().__init__(len(scenes), **plan)
        self.scenes, self.processor = scenes, processor
        self.picture_fraction, self.grid = picture_fraction, grid
        self.patch_width = sum(max(len(self._token_ids(words)) for words in choice) for choice in PATCH_WORD_CHOICES)

    def __getitem__(self, step: int) -> list[VLMBatch]:
        return [pack([self.document(number, step) for number in self.samples_of(step)])]

    def document(self, number: int, step: int) -> EncodedSample:
        """The document of a scene; another epoch asks other questions about it."""
        rng, scene = random.Random(f"{self.seed}/{step}/{number}"), self.scenes[number]
        is_picture = self.picture_fraction > 0 and rng.random() < self.picture_fraction
        rounds = pretraining_conversation(scene, rng, picture=IMAGE_TAG if is_picture else None)
        rounds += text_only_conversation(rng, num_questions=1)
        turns = tuple(turn for user, assistant in rounds for turn in (Turn("user", user), Turn("assistant", assistant)))
        if not is_picture:
            (sample,) = self.processor.encode(Record(key=str(number), turns=turns))
            return replace(sample, images={}, scales={})  # of no image
        ids_S, labels_S, segments_S = self.processor.template.encode(turns)
        return EncodedSample(str(number), ids_S, labels_S, segments_S, {DEFAULT_VIEW: self.told_picture(scene)})

    def told_picture(self, scene: Scene) -> torch.Tensor:
        """[1, P, W] token ids of the words of each patch, -1 behind the last."""
        ids = [self._token_ids(text) for text in patch_words(scene, self.grid)]
        return torch.tensor([[*row, *[-1] * (self.patch_width - len(row))] for row in ids]).unsqueeze(0)

    def _token_ids(self, words: str) -> list[int]:
        found: list[int] = self.processor.tokenizer(f" {words}", add_special_tokens=False)["input_ids"]
        return found


class _WorldPretraining(LightningDataModule):
    """Loaders over steps; a subclass says what a step holds."""

    processor: Processor | None = None

    def __init__(
        self,
        *,
        num_train_scenes: int,
        num_validation_scenes: int,
        global_batch_size: int,
        num_steps: int,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_scenes = {"train": num_train_scenes, "validation": num_validation_scenes}
        self.global_batch_size, self.num_steps = global_batch_size, num_steps
        self.num_workers, self.seed = num_workers, seed
        self.datasets: dict[str, _Steps] = {}

    def build_dataset(self, scenes: list[Scene], **plan: Any) -> _Steps:
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        if self.datasets:
            return
        rank = self.trainer.global_rank if self.trainer else 0
        world_size = self.trainer.world_size if self.trainer else 1
        for split, count in self.num_scenes.items():
            scenes = list(iterate_scenes(split, self.seed, count))
            batch_size = min(self.global_batch_size, count)
            self.datasets[split] = self.build_dataset(
                scenes, batch_size=batch_size, seed=self.seed, rank=rank, world_size=world_size
            )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", self.num_steps, lambda: self.trainer.global_step if self.trainer else 0)

    def val_dataloader(self) -> DataLoader[Any]:
        dataset = self.datasets["validation"]
        return self._loader("validation", dataset.num_samples // dataset.batch_size, lambda: 0)

    def _loader(self, split: str, num_steps: int, start: Callable[[], int]) -> DataLoader[Any]:
        return DataLoader(
            self.datasets[split],
            batch_size=None,
            sampler=StepSampler(num_steps, start),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            prefetch_factor=4 if self.num_workers else None,
        )


class WorldVisionDataModule(_WorldPretraining):
    """Rendered scenes with the attributes of the object under each patch."""

    def __init__(self, *, image_size: int = 96, grid: int = 6, **settings: Any) -> None:
        super().__init__(**settings)
        self.image_size, self.grid = image_size, grid

    def build_dataset(self, scenes: list[Scene], **plan: Any) -> _Steps:
        draw = partial(_draw, image_size=self.image_size, grid=self.grid)
        if self.num_workers > 1:
            with ProcessPoolExecutor(self.num_workers) as pool:
                drawn = list(pool.map(draw, scenes, chunksize=64))
        else:
            drawn = [draw(scene) for scene in scenes]
        pixels = np.stack([image for image, _ in drawn])
        labels = {name: np.stack([found[name].reshape(-1) for _, found in drawn]) for name in ATTRIBUTES}
        return SceneImages(pixels, labels, **plan)


class WorldLanguageDataModule(_WorldPretraining):
    """Descriptions of scenes with questions that they answer."""

    def __init__(self, *, processor: Processor, picture_fraction: float = 0.0, grid: int = 6, **settings: Any) -> None:
        """Keep what the documents are made with.

        Args:
            picture_fraction: share of the documents whose scene is a picture told in words, patch by patch.
            grid: patches along a side of such a picture; that of the vision encoder to come.

        Raises:
            ValueError: a share outside [0, 1].
        """
        super().__init__(**settings)
        if not 0 <= picture_fraction <= 1:
            raise ValueError(f"picture_fraction must lie in [0, 1], got {picture_fraction}; set data.picture_fraction")
        self.processor, self.picture_fraction, self.grid = processor, picture_fraction, grid

    def build_dataset(self, scenes: list[Scene], **plan: Any) -> _Steps:
        assert self.processor is not None
        return SceneDocuments(scenes, self.processor, picture_fraction=self.picture_fraction, grid=self.grid, **plan)


def _draw(scene: Scene, *, image_size: int, grid: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return np.asarray(render(scene, image_size)), patch_labels(scene, grid)


def _as_it_is(item: Any) -> Any:
    return item
