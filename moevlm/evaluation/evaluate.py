"""Run a model over benchmarks: records to prompts to answers to scores."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from moevlm.batch import IGNORE_INDEX, EncodedSample, Record
from moevlm.data.rejection import RejectedRecord, Rejection
from moevlm.evaluation.answers import Row, Scores, score_rows, write_answers
from moevlm.evaluation.benchmarks import Benchmark, find_benchmarks
from moevlm.evaluation.decoding import choose_decoding
from moevlm.evaluation.generation import generate
from moevlm.evaluation.perplexity import gold_nlls
from moevlm.metrics.routing import expert_distance
from moevlm.models.moe.router import random_routing
from moevlm.models.pretrained import load_pretrained
from moevlm.models.vlm import VLM
from moevlm.preprocessing.processor import Processor
from moevlm.preprocessing.rejection import RejectedSample
from moevlm.version import VERSION

ROUTINGS = ("learned", "random")
WINDOW = 512  # records whose pixels are in memory at the same time


def evaluate_folder(
    model_folder: str | Path,
    *,
    data_folder: str | Path,
    output_folder: str | Path,
    benchmarks: Sequence[str] | None = None,
    limit: int | Mapping[str, int | None] | None = None,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str | None = None,
    routing: str = "learned",
    seed: int = 0,
    perplexity: bool = True,
    decoding: str = "auto",
    max_rejected_fraction: float = 0.05,
    progress: bool = True,
) -> Scores:
    """Evaluate the model of a folder on the benchmarks of a data folder.

    Args:
        model_folder: as `save_pretrained` and `Processor.save_pretrained` leave it.
        data_folder: record files, see `find_benchmarks`.
        output_folder: gets ``answers/<benchmark>.jsonl``, ``scores.json`` and ``evaluation.json`` (how they were made).
        benchmarks: names, or None for all.
        limit: records per benchmark, a fixed random choice; None for all. One number, or one by benchmark name.
        batch_size: prompts that run together.
        device: "auto" is cuda where there is one, else cpu.
        dtype: of the weights; None means float32.
        routing: "learned", or "random": every token goes to random experts, to show how much these differ.
        seed: of random routing.
        perplexity: also score the gold answers under teacher forcing.
        decoding: how an answer's steps run, see `moevlm.evaluation.decoding.Session`.
        max_rejected_fraction: share of records that may be unusable.
        progress: show a bar for each benchmark.

    Returns:
        Metrics by benchmark. A sparse model has one more entry, ``experts``: the mean relative distance between the
        experts of each MoE layer (0: equal copies).

    Raises:
        ValueError: an option without meaning, a folder without model or benchmarks, too many unusable records.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}; set routing")
    chosen = find_benchmarks(data_folder, benchmarks)
    vlm = load_pretrained(model_folder, dtype=dtype).eval().to(choose_device(device))
    processor = Processor.from_pretrained(model_folder)
    limits = limit if isinstance(limit, Mapping) else dict.fromkeys((benchmark.name for benchmark in chosen), limit)
    options: dict[str, Any] = {"batch_size": batch_size, "perplexity": perplexity, "progress": progress}
    folder = Path(output_folder)
    scores: Scores = {}
    with random_routing(vlm, seed=seed) if routing == "random" else contextlib.nullcontext():
        decoding = options["decoding"] = choose_decoding(vlm, decoding, batch_size)
        for benchmark in chosen:
            rows, rejected = answer_benchmark(vlm, processor, benchmark, limit=limits.get(benchmark.name), **options)
            check_rejected(benchmark, len(rows), rejected, max_rejected_fraction)
            write_answers(folder / "answers" / f"{benchmark.name}.jsonl", rows)
            scores[benchmark.name] = score_rows(rows) | {"num_rejected": len(rejected)}
    if vlm.moe_layers:
        scores["experts"] = expert_distances(vlm)
    settings = {"model_folder": str(model_folder), "routing": routing, "seed": seed, "limit": limit, "dtype": dtype}
    settings |= {
        "batch_size": batch_size,
        "device": str(next(vlm.parameters()).device),
        "decoding": f"greedy, {decoding}",
    }
    settings["benchmarks"] = {benchmark.name: _describe(benchmark) for benchmark in chosen}
    settings["versions"] = {"moevlm": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
    _write_json(folder / "evaluation.json", settings)
    _write_json(folder / "scores.json", scores)
    return scores


def answer_benchmark(
    vlm: VLM,
    processor: Processor,
    benchmark: Benchmark,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    perplexity: bool = True,
    progress: bool = True,
    decoding: str = "auto",
) -> tuple[list[Row], list[Rejection]]:
    """Answer the last question of every record; earlier turns are given as they are in the record.

    Returns:
        Rows ``{id, benchmark, scorer, split, kind, question, gold, answer, num_new_tokens, text_only, ...}`` in the
        order of the records, with every further field of the record; and the records that could not be used.
    """
    records = benchmark.select(limit=limit)
    rows: list[Row] = []
    rejected: list[Rejection] = []
    with tqdm(total=len(records), desc=benchmark.name, unit="answer", disable=not progress) as bar:
        for start in range(0, len(records), WINDOW):
            usable: list[tuple[Row, EncodedSample, EncodedSample | None]] = []
            for split, file, number in records[start : start + WINDOW]:
                try:
                    usable.append(_prepare(processor, benchmark, split, file.read(number), perplexity=perplexity))
                except (RejectedRecord, RejectedSample) as error:
                    rejected.append(Rejection(file.name(number), error.reason, error.detail))
                    bar.update()
            prompts = [prompt for _, prompt, _ in usable]
            stops = processor.stop_token_ids
            answers = generate(
                vlm, prompts, max_new_tokens=benchmark.max_new_tokens, eos_token_ids=stops, batch_size=batch_size,
                on_batch=bar.update, decoding=decoding,
            )  # fmt: skip
            for (row, _, _), answer in zip(usable, answers):
                row["answer"] = processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
                row["num_new_tokens"] = len(answer)
                if benchmark.extract is not None:
                    row["mentioned"] = list(benchmark.extract(row["answer"]))
            golds = [gold for _, _, gold in usable if gold is not None]
            scored = [row for row, _, gold in usable if gold is not None]
            for row, (nll, count) in zip(scored, gold_nlls(vlm, golds, batch_size=batch_size)):
                row["gold_nll"], row["num_gold_tokens"] = nll, count
            rows += [row for row, _, _ in usable]
    return rows, rejected


def _prepare(
    processor: Processor, benchmark: Benchmark, split: str, record: Record, *, perplexity: bool
) -> tuple[Row, EncodedSample, EncodedSample | None]:
    """The row but for its answer, the prompt, and the whole conversation with its last answer as the only label."""
    *turns, last = record.turns
    if last.role != "assistant" or not turns:
        raise RejectedSample("no_answer", "a record to evaluate on must end with its gold answer")
    known = {key: value for key, value in record.metadata.items() if key not in ("image", "conversations")}
    row: Row = {"id": record.key, "kind": benchmark.name} | known
    row |= {"benchmark": benchmark.name, "scorer": benchmark.scorer, "split": split}
    row |= {"question": turns[-1].text.replace("<image>", "").strip(), "gold": last.text}
    row["text_only"] = not record.images
    if benchmark.extract is not None:
        row["gold_mentioned"] = list(benchmark.extract(last.text))
    prompt = processor.encode_prompt(turns, record.images, key=record.key)
    if not perplexity:
        return row, prompt, None
    ids_S, labels_S, segments_S = processor.template.encode(record.turns)
    labels_S[: len(prompt.input_ids)] = IGNORE_INDEX  # answers of earlier turns
    return row, prompt, replace(prompt, input_ids=ids_S, labels=labels_S, segments=segments_S)


def check_rejected(
    benchmark: Benchmark, num_rows: int, rejected: Sequence[Rejection], max_rejected_fraction: float
) -> None:
    """Refuse a score over too few of its records.

    Raises:
        ValueError: the share of unusable records exceeds the limit, or no record is left.
    """
    if rejected and (not num_rows or len(rejected) > max_rejected_fraction * (num_rows + len(rejected))):
        first = rejected[0]
        raise ValueError(
            f"benchmark {benchmark.name}: {len(rejected)} of {num_rows + len(rejected)} records are unusable, first "
            f"{first.key} ({first.reason}{': ' + first.detail if first.detail else ''}); mend them, or raise "
            f"max_rejected_fraction={max_rejected_fraction}"
        )


def expert_distances(vlm: VLM) -> dict[str, float]:
    """Mean relative distance between the experts of each MoE layer, and over layers as ``distance``."""
    distances = {
        f"distance_layer_{index:02d}": float(expert_distance(layer.experts.expert_weights()))
        for index, layer in vlm.moe_layers.items()
        if layer.num_experts > 1
    }
    return {"distance": sum(distances.values()) / max(len(distances), 1)} | distances


def choose_device(name: str) -> torch.device:
    """The named device, or for "auto" cuda where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def headline(scores: Scores) -> Iterator[tuple[str, str, float, int]]:
    """(benchmark, metric, value, rows) of the metrics that belong into a short table; `scores` has all of them."""
    of_pope_splits = ("precision_", "recall_", "yes_ratio_", "unparsable_fraction_")
    details = ("num_", "distance_", "gold_nll", "accuracy_kind_", *of_pope_splits)
    for name, metrics in scores.items():
        for metric, value in metrics.items():
            if not metric.startswith(details):
                yield name, metric, value, int(metrics.get("num_rows", 0))


def _describe(benchmark: Benchmark) -> dict[str, Any]:
    """What identifies a benchmark in a result: its files by content, and how it was asked."""
    files = {
        split: {"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for split, file in benchmark.files.items()
    }
    return {"files": files, "scorer": benchmark.scorer, "max_new_tokens": benchmark.max_new_tokens}


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
