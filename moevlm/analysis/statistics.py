"""What a model's routers did over many batches: counts that add up, and the shares made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from moevlm.analysis.pathways import Path, count_pathways, num_effective_paths, top_pathways
from moevlm.batch import Routing, Segment
from moevlm.metrics.routing import choice_counts_by_segment, entropy, importance

MODALITIES = ("image", "text")
NUM_SEGMENTS = len(Segment)


@dataclass
class LayerStatistics:
    """Sums over tokens of one MoE layer with E experts."""

    num_experts: int
    choices: np.ndarray  # [E, NUM_SEGMENTS] int64: how often a token of the segment chose the expert
    probs: np.ndarray  # [E] float64: sum of router probabilities
    entropy: float = 0.0  # sum over tokens, nats
    num_dropped: int = 0  # choices that found no room

    @property
    def load(self) -> np.ndarray:
        """[E] share of all choices; sums to 1."""
        return _share(self.choices.sum(axis=1))

    @property
    def load_by_segment(self) -> np.ndarray:
        """[E, NUM_SEGMENTS] share of the segment's choices; each column of a segment that occurs sums to 1."""
        return _share(self.choices, axis=0)

    @property
    def load_by_modality(self) -> dict[str, np.ndarray]:
        """[E] share of the modality's choices, text being every segment but the image."""
        image = self.choices[:, Segment.IMAGE]
        return {"image": _share(image), "text": _share(self.choices.sum(axis=1) - image)}

    @property
    def segments_of_expert(self) -> np.ndarray:
        """[E, NUM_SEGMENTS] what an expert is fed; each row of a used expert sums to 1."""
        return _share(self.choices, axis=1)


@dataclass
class RoutingStatistics:
    """Routing of one model, accumulated over batches by `add`; layers are decoder layer indices in order."""

    max_pathway_tokens: int = 100_000  # per modality, kept one by one for the PCA view
    layers: dict[int, LayerStatistics] = field(default_factory=dict)
    num_tokens: int = 0
    pathways: dict[str, Counter[Path]] = field(default_factory=lambda: {name: Counter() for name in MODALITIES})
    _top1: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in MODALITIES})

    def add(self, routings: Mapping[int, Routing], segments_T: Tensor) -> None:
        """Count one forward pass.

        Args:
            routings: record of each MoE layer, all over the same T tokens.
            segments_T: `Segment` of each of these tokens.

        Raises:
            ValueError: no MoE layer in the records, or another number of tokens or layers than expected.
        """
        if not routings:
            raise ValueError("the model has no MoE layers, so there is no routing to analyse; give a sparse model")
        if self.layers and list(self.layers) != sorted(routings):
            raise ValueError(f"routing of layers {sorted(routings)}, but {list(self.layers)} were counted before")
        segments = segments_T.cpu().numpy()
        for index in sorted(routings):
            self._add_layer(index, routings[index], segments_T)
        self.num_tokens += len(segments)
        top1_TL = np.stack([_top1_experts(routings[index]) for index in sorted(routings)], axis=1)
        for modality, chosen in (("image", segments == Segment.IMAGE), ("text", segments != Segment.IMAGE)):
            self.pathways[modality].update(count_pathways(top1_TL[chosen]))
            room = self.max_pathway_tokens - sum(map(len, self._top1[modality]))
            self._top1[modality].append(top1_TL[chosen][: max(room, 0)])

    def _add_layer(self, index: int, routing: Routing, segments_T: Tensor) -> None:
        num_tokens, num_experts = routing.router_probs.shape
        if num_tokens != len(segments_T):
            raise ValueError(f"layer {index} routed {num_tokens} tokens, but there are {len(segments_T)} segments")
        if index not in self.layers:
            empty = np.zeros((num_experts, NUM_SEGMENTS), dtype=np.int64)
            self.layers[index] = LayerStatistics(num_experts, empty, np.zeros(num_experts))
        layer = self.layers[index]
        counts_GE = choice_counts_by_segment(routing.expert_ids, segments_T, num_experts=num_experts)
        layer.choices += counts_GE.T.long().cpu().numpy()
        layer.probs += importance(routing.router_probs).double().cpu().numpy() * num_tokens
        layer.entropy += float(entropy(routing.router_probs)) * num_tokens
        layer.num_dropped += 0 if routing.dropped is None else int(routing.dropped.sum())

    def top1(self, modality: str) -> np.ndarray:
        """[T, L] top-1 expert of the modality's tokens in each layer, of at most `max_pathway_tokens` tokens."""
        return np.concatenate(self._top1[modality]) if self._top1[modality] else np.zeros((0, len(self.layers)), int)

    def summary(self, *, num_paths: int = 10) -> dict[str, Any]:
        """Plain numbers for routing.json: per layer load, importance, entropy, dropped fraction; the top pathways."""
        names = [segment.name.lower() for segment in Segment]
        layers = {}
        for index, layer in self.layers.items():
            by_segment = layer.load_by_segment.T.tolist()
            layers[f"layer_{index:02d}"] = {
                "num_experts": layer.num_experts,
                "load": layer.load.tolist(),
                "importance": (layer.probs / max(self.num_tokens, 1)).tolist(),
                "load_by_segment": dict(zip(names, by_segment)),
                "load_by_modality": {name: load.tolist() for name, load in layer.load_by_modality.items()},
                "max_over_mean_load": float(layer.load.max() * layer.num_experts),
                "entropy": layer.entropy / max(self.num_tokens, 1),
                "dropped_fraction": layer.num_dropped / max(int(layer.choices.sum()), 1),
            }
        pathways = {modality: self._summarise_paths(modality, num_paths) for modality in MODALITIES}
        return {"num_tokens": self.num_tokens, "layers": layers, "pathways": pathways}

    def _summarise_paths(self, modality: str, num_paths: int) -> dict[str, Any]:
        counts = self.pathways[modality]
        total = sum(counts.values())
        top = [
            {"experts": list(path), "num_tokens": count, "fraction": count / total}
            for path, count in top_pathways(counts, num_paths)
        ]
        sizes = {"num_tokens": total, "num_paths": len(counts), "num_effective_paths": num_effective_paths(counts)}
        return sizes | {"top": top}


def _top1_experts(routing: Routing) -> np.ndarray:
    """[T] the choice of highest router probability; choices need not come sorted."""
    chosen_TK = routing.router_probs.gather(1, routing.expert_ids)
    return routing.expert_ids.gather(1, chosen_TK.argmax(dim=1, keepdim=True)).squeeze(1).cpu().numpy()


def _share(counts: np.ndarray, axis: int = 0) -> np.ndarray:
    totals = counts.sum(axis=axis, keepdims=True)
    return np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
