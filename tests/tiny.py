"""Tiny models, batches, tokenizers and folders from random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moevlm.batch import DEFAULT_VIEW, IGNORE_INDEX, IMAGE_TOKEN_ID, NO_PAIR, Segment, VLMBatch
from moevlm.models.build import build_vlm
from moevlm.models.pretrained import save_pretrained
from moevlm.models.vision_encoder import VisionEncoder
from moevlm.models.vlm import VLM

IMAGE_SIZE = 32
PATCH_SIZE = 8  # 16 patches
WIDTH = 32
NUM_LAYERS = 4
VOCAB_SIZE = 320  # the tiny tokenizer has 259 ids

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_vision_config(**changes: Any) -> dict[str, Any]:
    """Arguments of `VisionEncoder`; a key of `timm_options` may be given directly."""
    options = {"patch_size": PATCH_SIZE, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    config: dict[str, Any] = {"name": "vit", "image_size": IMAGE_SIZE, "feature_layer": -2}
    for key, value in changes.items():
        (options if key in options else config)[key] = value
    return {**config, "timm_options": options}


def tiny_decoder_config(model_type: str = "qwen2", **changes: Any) -> dict[str, Any]:
    """A decoder config with few, narrow layers; any key may be overridden."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        **changes,
    }


def tiny_vlm(
    moe: dict[str, Any] | None = None,
    seed: int = 0,
    *,
    vision: dict[str, Any] | str | None = "default",
    connector: str = "mlp2x_gelu",
    language_model: dict[str, Any] | str | None = None,
    **options: Any,
) -> VLM:
    """A VLM with random weights.

    Args:
        moe: arguments of `upcycle`, such as ``{"num_experts": 4, "top_k": 2}``; None for a dense model.
        vision: arguments of `VisionEncoder`; None for a blind model.
        options: further arguments of `build_vlm`.
    """
    vision_config = tiny_vision_config() if isinstance(vision, str) else vision
    decoder = tiny_decoder_config() if language_model is None else language_model
    return build_vlm(vision_config, connector, decoder, moe=moe, seed=seed, **options)


def tiny_batch(
    sequences: Sequence[str] = ("siqqaa", "sqqaaa", "iqaqa"),
    seed: int = 0,
    *,
    pairs: bool = False,
    image_size: int = IMAGE_SIZE,
    vocab_size: int = 256,
    views: Sequence[str] = (DEFAULT_VIEW,),
    content_seed: int | None = None,
) -> VLMBatch:
    """One packed micro-batch.

    Args:
        sequences: one string per sequence, a letter per text token: ``s`` system, ``q`` question, ``a`` answer
            (supervised), ``i`` an image. A sequence must not start with ``a``.
        pairs: read sequences two by two as (chosen, rejected).
        content_seed: when given, sequence b is drawn by ``content_seed + b`` alone, so it stays the same in other
            batches.
    """
    segment_of = {"i": Segment.IMAGE, "s": Segment.SYSTEM, "q": Segment.QUESTION, "a": Segment.ANSWER}
    shared = torch.Generator().manual_seed(seed)
    ids, labels, segments, images, image_sequences = [], [], [], [], []
    for row, letters in enumerate(sequences):
        generator = shared if content_seed is None else torch.Generator().manual_seed(content_seed + row)
        for letter in letters:
            token = int(torch.randint(3, vocab_size, (1,), generator=generator))
            ids.append(IMAGE_TOKEN_ID if letter == "i" else token)
            labels.append(token if letter == "a" else IGNORE_INDEX)
            segments.append(int(segment_of[letter]))
            if letter == "i":
                images.append(torch.randn(3, image_size, image_size, generator=generator))
                image_sequences.append(row)
    num_sequences = len(sequences)
    stacked = torch.stack(images) if images else torch.zeros(0, 3, image_size, image_size)
    return VLMBatch(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        segments=torch.tensor(segments),
        lengths=tuple(len(letters) for letters in sequences),
        num_targets=sum(label != IGNORE_INDEX for label in labels),
        image_sequences=tuple(image_sequences),
        images=dict.fromkeys(views, stacked),
        sources=torch.zeros(num_sequences, dtype=torch.int64),
        pair_ids=torch.tensor([row // 2 if pairs else NO_PAIR for row in range(num_sequences)]),
        is_chosen=torch.tensor([pairs and row % 2 == 0 for row in range(num_sequences)]),
        keys=tuple(f"sample{row}" for row in range(num_sequences)),
        num_pairs=num_sequences // 2 if pairs else 0,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 3 special tokens, then 256 bytes; Qwen's chat format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_decoder(folder: str | Path, *, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder: language model and tokenizer; its path goes into `language_model`."""
    vlm = tiny_vlm(seed=seed, vision=None, language_model=tiny_decoder_config(**changes))
    vlm.language_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def save_tiny_vision_encoder(folder: str | Path, *, seed: int = 0, **changes: Any) -> Path:
    """A vision encoder folder with all its blocks; its path goes into `vision_encoder.weights`."""
    torch.manual_seed(seed)
    VisionEncoder(**tiny_vision_config(feature_layer=-1, **changes)).save_pretrained(folder)
    return Path(folder)


def save_tiny_vlm(folder: str | Path, moe: dict[str, Any] | None = None, *, seed: int = 0, **options: Any) -> Path:
    """A model folder with tokenizer, but without processor.json; its path goes into `weights`."""
    save_pretrained(tiny_vlm(moe, seed, **options), folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
