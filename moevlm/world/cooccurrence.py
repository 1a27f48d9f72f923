"""How often categories are there, alone and together: the prior that hallucination follows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.world import vocabulary as v
from moevlm.world.ground_truth import categories
from moevlm.world.scenes import Scene


@dataclass(frozen=True)
class CoOccurrence:
    """Counts over a set of scenes, in the order of `vocabulary.CATEGORIES`."""

    num_scenes: int
    together: np.ndarray  # (categories, categories) int64: scenes that hold both; the diagonal counts each alone

    @property
    def marginal(self) -> np.ndarray:
        """P(category is there)."""
        return np.diag(self.together) / max(self.num_scenes, 1)

    @property
    def conditional(self) -> np.ndarray:
        """P(column is there | row is there); 0 where the row never occurs."""
        return self.together / np.diag(self.together).clip(min=1)[:, None]

    def most_popular(self, absent: Sequence[str]) -> list[str]:
        """Absent categories, the most frequent first."""
        marginal = self.marginal
        return sorted(absent, key=lambda c: (-marginal[v.CATEGORIES.index(c)], c))

    def most_cooccurring(self, present: Sequence[str], absent: Sequence[str]) -> list[str]:
        """Absent categories by the sum over what is there of P(absent | there), the highest first."""
        score = self.conditional[[v.CATEGORIES.index(c) for c in present]].sum(axis=0)
        return sorted(absent, key=lambda c: (-score[v.CATEGORIES.index(c)], c))


def count_cooccurrence(scenes: Iterable[Scene]) -> CoOccurrence:
    """Count over scenes; use training scenes, whose statistics a model can have learned."""
    together = np.zeros((len(v.CATEGORIES), len(v.CATEGORIES)), dtype=np.int64)
    num_scenes = 0
    for scene in scenes:
        ids = [v.CATEGORIES.index(c) for c in categories(scene)]
        together[np.ix_(ids, ids)] += 1
        num_scenes += 1
    return CoOccurrence(num_scenes, together)
