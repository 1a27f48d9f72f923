"""A preference run writes its reference's log-probabilities only where it reads as many as it would write."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from experiments.cache_teacher import leave_missing_references, prepare_references
from experiments.instantiate import build
from tests.samples import make_shards, preference_record

NUM_PAIRS = 12


def config(folder: Path, *, num_steps: int, references: str = "auto") -> DictConfig:
    source = {"name": "pairs", "shards": str(folder / "shards")}
    image = {"image_size": 96, "mode": "pad"}
    return OmegaConf.create(
        {
            "cache": {
                "batch_size": 12,
                "device": "auto",
                "dtype": None,
                "references": references,
                "part": 0,
                "num_parts": 1,
            },
            "trainer": {"accelerator": "cpu"},
            "data": {
                "_target_": "datamodules.preferences.PreferenceDataModule",
                "sources": [source],
                "validation_sources": [source],
                "num_validation_samples": 2,
                "processor": {
                    "_target_": "moevlm.preprocessing.processor.build_processor",
                    "tokenizer": "backbones/mini/student_language_model",
                    "chat_template": "chatml",
                    "image": image,
                    "num_visual_tokens": 36,
                },
                "reference": "teacher",
                "references": {"teacher": "backbones/mini/teacher"},
                "num_steps": num_steps,
                "global_batch_size": 2,
                "micro_batch_size": 2,
            },
        }
    )


@pytest.mark.parametrize(
    ("num_steps", "references", "is_written"), [(3, "auto", False), (4, "auto", True), (1, "always", True)]
)
def test_a_cache_is_written_when_the_run_reads_as_many_pairs(
    tmp_path: Path, num_steps: int, references: str, is_written: bool
) -> None:
    make_shards(tmp_path, [preference_record(number) for number in range(NUM_PAIRS)])
    cfg = config(tmp_path, num_steps=num_steps, references=references)
    prepare_references(cfg)
    leave_missing_references(cfg)
    assert bool(list((tmp_path / "shards").glob("teacher_*/manifest.json"))) == is_written
    assert build(cfg.data).provides == ({"reference:teacher"} if is_written else set())


def test_a_word_that_is_no_choice_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path, [preference_record(0)])
    with pytest.raises(ValueError, match=r"cache.references must be one of auto, always, got 'no'; set cache"):
        prepare_references(config(tmp_path, num_steps=1, references="no"))
