"""A small byte-level BPE tokenizer from text, in Hugging Face form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
CHATML_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocabulary_size: int,
    special_tokens: Sequence[str] = CHATML_TOKENS,
    chat_template: str | None = CHATML_TEMPLATE,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE (GPT-2's): no text is ever out of vocabulary.

    Args:
        texts: what to learn merges from.
        vocabulary_size: at least 256 bytes plus the special tokens; fewer are made when the text has no more pairs.
        special_tokens: get the first ids, in this order; ``<|im_end|>`` becomes the eos token where it is among them,
            ``<|endoftext|>`` (else the first) the padding token.
        chat_template: Jinja, stored with the tokenizer.
    """
    smallest = 256 + len(special_tokens)
    if vocabulary_size < smallest:
        raise ValueError(f"vocabulary_size must be at least {smallest}, got {vocabulary_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokens = list(special_tokens)
    pad = END_OF_TEXT if END_OF_TEXT in tokens else (tokens[0] if tokens else None)
    eos = "<|im_end|>" if "<|im_end|>" in tokens else pad
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[token for token in tokens if token not in (eos, pad)],
        clean_up_tokenization_spaces=False,
    )
    if chat_template is not None:
        wrapped.chat_template = chat_template
    return wrapped
