"""Everything one can choose about the MoE layers of a model, checked before any weight is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POLICIES = ("dropless", "deepspeed")
SCORES = ("softmax", "sigmoid")
DROP_ORDERS = ("position", "probability", "random")
INITIALISATIONS = ("copy", "noise", "drop_upcycling", "virtual_groups")
EXPERT_KINDS = ("full", "lora")
SHARED_EXPERTS = ("full", "partition")
KERNELS = ("auto", "plain", "fused")
INITIAL_KEYS = ("initialisation", "init_noise", "reinit_fraction", "router_init_std", "seed")
"""Keys that say where weights start, and nothing about a model that has them."""
RUNNING_KEYS = ("kernel",)
"""Keys that say how a model is run, and nothing about the function that it is."""


@dataclass(frozen=True)
class MoESettings:
    """The keys of ``model.moe``; docs/moe.md explains each. The same values make the same model.

    Raises:
        ValueError: a value out of range, or an option that would have no effect beside the others.
    """

    num_experts: int | Sequence[int]  # routed experts, one number or one per MoE layer
    top_k: int = 2
    placement: str | Sequence[int] = "interval"
    # routing
    policy: str = "dropless"
    score: str = "softmax"
    normalise_weights: bool | None = None  # None: the policy's own rule
    weight_scale: float = 1.0
    jitter: float = 0.0
    bias_update_rate: float = 0.0
    # capacity, policy deepspeed only
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 0
    drop_order: str = "position"
    sample_second_choice: bool = False
    # experts
    experts: str = "full"
    lora_rank: int | None = None
    lora_alpha: float | None = None  # None: twice the rank
    granularity: int = 1
    shared_expert: str | None = None
    shared_fraction: float | None = None
    residual: bool = False
    kernel: str = "auto"
    # where weights start
    initialisation: str = "copy"
    init_noise: float | None = None
    reinit_fraction: float | None = None
    router_init_std: float | None = 0.02  # None: uniform as nn.Linear's, which is DeepSpeed's
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_kinds()
        counts = [self.num_experts] if isinstance(self.num_experts, int) else list(self.num_experts)
        for count in counts:
            _require(count >= 1, f"num_experts must be at least 1, got {count}", "num_experts")
            _require(1 <= self.top_k <= count, f"top_k must lie in [1, num_experts={count}], got {self.top_k}", "top_k")
        for key, known in (
            ("policy", POLICIES),
            ("score", SCORES),
            ("drop_order", DROP_ORDERS),
            ("experts", EXPERT_KINDS),
            ("shared_expert", (None, *SHARED_EXPERTS)),
            ("initialisation", INITIALISATIONS),
            ("kernel", KERNELS),
        ):
            value = getattr(self, key)
            names = ", ".join("null" if name is None else name for name in known)
            _require(value in known, f"unknown {key} {value!r}; known: {names}", key)
        self._check_routing()
        self._check_capacity()
        self._check_experts(counts)
        self._check_initialisation()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoESettings:
        """The settings of a ``model.moe`` mapping.

        Raises:
            ValueError: an unknown key, or no num_experts; and whatever the values break.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        _require(not unknown, f"unknown key {', '.join(unknown)} in model.moe; known: {', '.join(known)}", "")
        _require("num_experts" in values, "model.moe has no num_experts", "num_experts")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` turns into these settings again."""
        return {
            key: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @property
    def normalises(self) -> bool:
        """Whether a token's weights are divided by their sum; DeepSpeed's top-1 keeps the raw probability."""
        if self.normalise_weights is None:
            return self.policy == "dropless" or self.top_k > 1
        return self.normalise_weights

    def _check_kinds(self) -> None:
        """Words where numbers belong, and numbers where words do, before anything is compared."""
        for field in dataclasses.fields(self):
            single, _, listed = str(field.type).partition("Sequence")  # a list holds whole numbers
            value = getattr(self, field.name)
            if listed and isinstance(value, Sequence) and not isinstance(value, str):
                fits = all(_fits(one, "int") for one in value)
            else:
                fits = _fits(value, single)
            known = _describe(single) + (", or a list of whole numbers" if listed else "")
            _require(fits, f"{field.name} must be {known}, got {value!r}", field.name)

    def _check_routing(self) -> None:
        for key in ("jitter", "bias_update_rate"):
            value = getattr(self, key)
            _require(0 <= value < 1, f"{key} must lie in [0, 1), got {value}", key)
        _require(self.weight_scale > 0, f"weight_scale must be positive, got {self.weight_scale}", "weight_scale")
        if self.sample_second_choice:
            fits = self.policy == "deepspeed" and self.top_k == 2 and self.score == "softmax"
            _require(
                fits,
                "sample_second_choice draws the second of two choices under policy deepspeed with softmax scores; "
                f"got policy {self.policy}, top_k {self.top_k}, score {self.score}",
                "sample_second_choice",
            )

    def _check_capacity(self) -> None:
        for key in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, key)
            _require(value is None or value > 0, f"{key} must be positive, or null for no limit, got {value}", key)
        _require(self.min_capacity >= 0, f"min_capacity must not be negative, got {self.min_capacity}", "min_capacity")
        limited = self.capacity_factor is not None or self.eval_capacity_factor is not None
        if self.policy == "dropless":
            _require(
                not limited,
                f"policy dropless drops nothing, got capacity_factor={self.capacity_factor} and "
                f"eval_capacity_factor={self.eval_capacity_factor}; set model.moe.policy=deepspeed, or both to null",
                "",
            )
        else:
            _require(
                self.capacity_factor is not None,
                "policy deepspeed needs a capacity_factor (MoE-LLaVA trains with 1.5)",
                "capacity_factor",
            )
        if not limited:
            _require(self.min_capacity == 0, f"min_capacity={self.min_capacity} needs a capacity_factor", "policy")
            _require(self.drop_order == "position", f"drop_order={self.drop_order} needs a capacity_factor", "policy")

    def _check_experts(self, counts: Sequence[int]) -> None:
        if self.experts == "lora":
            rank = self.lora_rank
            _require(rank is not None and rank >= 1, f"LoRA experts need a rank of at least 1, got {rank}", "lora_rank")
            whole = self.granularity == 1 and self.initialisation == "copy" and self.shared_expert != "full"
            _require(
                whole,
                "LoRA experts start as the one frozen network they share: granularity must be 1, initialisation copy "
                f"and shared_expert null or partition, got {self.granularity}, {self.initialisation} and "
                f"{self.shared_expert}",
                "experts=full, or these",
            )
        else:
            no_rank = self.lora_rank is None and self.lora_alpha is None
            _require(no_rank, "lora_rank and lora_alpha belong to experts=lora", "experts")
        _require(self.granularity >= 1, f"granularity must be at least 1, got {self.granularity}", "granularity")
        for name, number in [("top_k", self.top_k), *(("num_experts", count) for count in counts)]:
            _require(
                number % self.granularity == 0,
                f"{name} counts slices and must be a multiple of granularity={self.granularity}, got {number}",
                name,
            )
        _require(
            not (self.shared_expert and self.residual),
            "a shared expert and a residual layer are two answers to one question",
            "residual or model.moe.shared_expert",
        )
        if self.shared_expert == "partition":
            fraction = self.shared_fraction
            _require(
                fraction is not None and 0 < fraction < 1,
                f"a shared expert by partition needs a shared_fraction in (0, 1), got {fraction}",
                "shared_fraction",
            )
        else:
            _require(
                self.shared_fraction is None, "shared_fraction belongs to shared_expert=partition", "shared_expert"
            )

    def _check_initialisation(self) -> None:
        _require(
            (self.granularity > 1) == (self.initialisation == "virtual_groups"),
            "virtual groups and a granularity above 1 come together, got initialisation "
            f"{self.initialisation} and granularity {self.granularity}",
            "initialisation and model.moe.granularity",
        )
        for key, name, low in (("init_noise", "noise", 0.0), ("reinit_fraction", "drop_upcycling", 0.0)):
            value = getattr(self, key)
            if self.initialisation == name:
                upper = 1.0 if name == "drop_upcycling" else float("inf")
                _require(
                    value is not None and low <= value <= upper,
                    f"initialisation {name} needs {key} in [0, {upper:g}], got {value}",
                    key,
                )
            else:
                _require(value is None, f"{key} belongs to initialisation={name}", "initialisation")
        std = self.router_init_std
        _require(std is None or std >= 0, f"router_init_std must not be negative, got {std}", "router_init_std")


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of one of the types that an annotation names; True is no number."""
    if value is None:
        return "None" in kind
    if isinstance(value, bool):
        return "bool" in kind
    is_number = isinstance(value, int) and ("int" in kind or "float" in kind)
    return is_number or (isinstance(value, float) and "float" in kind) or (isinstance(value, str) and "str" in kind)


def _describe(kind: str) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
    named = [text for name, text in words.items() if name in kind]
    return ", or ".join([*named, *(["null"] if "None" in kind else [])])


def _require(condition: bool, fault: str, key: str) -> None:
    if not condition:
        raise ValueError(f"{fault}; set model.moe.{key}" if key else fault)
