from pathlib import Path

import pytest

from lightning_modules.strategies import ShardedStrategy, consolidate


def test_what_is_no_sharded_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no sharded checkpoint folder"):
        consolidate(tmp_path)


def test_all_ranks_are_data_parallel() -> None:
    """Lightning's default would make the devices of a node tensor parallel. The rest is in test_ranks.py."""
    strategy = ShardedStrategy(param_dtype="bfloat16")
    assert strategy._tensor_parallel_size == 1
    assert strategy.param_dtype == "bfloat16"
