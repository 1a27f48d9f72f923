"""Whole conversations to token ids, labels and segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moevlm.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Segment, Turn
from moevlm.preprocessing.jinja_templates import has_generation_tags, render_tagged, to_jinja
from moevlm.preprocessing.rejection import RejectedSample
from moevlm.preprocessing.templates import (
    IMAGE_TAG,
    MARKUPS,
    PLAIN_END,
    Piece,
    apply_template,
    render_backbone,
    render_markup,
    render_plain,
)

IMAGE = int(Segment.IMAGE)
MAX_KNOWN, MAX_KNOWN_LENGTH = 4096, 96
TEMPLATES = ("backbone", "plain", *MARKUPS)


class ChatTemplate:
    """Tokenizes conversations; the labels are every assistant answer and the end token that closes it.

    Args:
        name: `backbone` (the tokenizer's own chat template; ``{% generation %}`` tags in it say what is supervised),
            `plain` (LLaVA's stage-1 captions), `chatml`, `qwen3` (ChatML with an empty thought before every
            answer), or a layout of LLaVA and MoE-LLaVA: `vicuna_v1`, `phi`, `qwen`, `stablelm`, `openchat`.
        tokenizer: a Hugging Face tokenizer.

    Raises:
        ValueError: an unknown name, or a tokenizer that lacks what the template needs.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        if name not in TEMPLATES:
            raise ValueError(
                f"chat_template must be one of {', '.join(TEMPLATES)}, got {name!r}; set processor.chat_template"
            )
        self.name, self.tokenizer = name, tokenizer
        self._known: dict[str, tuple[int, ...]] = {}  # ids of short texts, which are the same in many conversations
        self._forbidden = self._special_texts()
        self.end = self._find_end()
        self._opening = self._opening_ids()
        self._marks_first_word = self._ids("\nb") != self._ids("\n") + self._ids("b")

    @property
    def jinja(self) -> str | None:
        """The layout for the tokenizer's own ``chat_template``, with generation tags; None to leave that as it is."""
        markup = MARKUPS.get(self.name)
        return None if markup is None else to_jinja(markup, self.end, self.tokenizer.decode(self._opening))

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer in generation: the template's end token and the tokenizer's own."""
        ids = self._tokenize(self.end, after="a")
        found = ids if len(ids) == 1 else []
        if self.tokenizer.eos_token_id is not None and self.tokenizer.eos_token_id not in found:
            found = [*found, self.tokenizer.eos_token_id]
        return found

    def encode(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of one conversation.

        Args:
            turns: optional system turn, then user and assistant by turns; ``<image>`` stands in user turns only.
            add_generation_prompt: end with the words after which the model answers; needs no answer yet.

        Returns:
            input_ids_S with one IMAGE_TOKEN_ID per ``<image>``, labels_S and segments_S, all int64.

        Raises:
            RejectedSample: the conversation has no exact mask.
        """
        self._check(turns, add_generation_prompt)
        ids = list(self._opening)
        labels = [IGNORE_INDEX] * len(ids)
        segments = [int(Segment.SYSTEM)] * len(ids)
        before = ""
        for piece in self.render(turns, add_generation_prompt=add_generation_prompt):
            tokens = self._tokenize(piece.text, after=before)
            before = piece.text
            ids += tokens
            labels += tokens if piece.supervised else [IGNORE_INDEX] * len(tokens)
            segments += [int(piece.segment)] * len(tokens)
        if IMAGE_TOKEN_ID in ids:
            segments = [IMAGE if token == IMAGE_TOKEN_ID else segment for token, segment in zip(ids, segments)]
        ids_S, labels_S, segments_S = torch.from_numpy(np.array([ids, labels, segments], dtype=np.int64))
        return ids_S, labels_S, segments_S

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> list[Piece]:
        """The text pieces of a conversation, before tokenization."""
        if self.name == "plain":
            return render_plain(turns, add_generation_prompt)
        if self.name == "backbone" and has_generation_tags(self.tokenizer.chat_template):
            return render_tagged(self.tokenizer, turns, add_generation_prompt)
        if self.name == "backbone":
            return render_backbone(self.tokenizer, self.end, turns, add_generation_prompt)
        return render_markup(MARKUPS[self.name], self.end, turns, add_generation_prompt)

    def _check(self, turns: Sequence[Turn], add_generation_prompt: bool) -> None:
        if not turns:
            raise RejectedSample("no_turns")
        if add_generation_prompt and turns[-1].role != "user":
            raise RejectedSample("no_question", "a prompt must end with a user turn")
        if not add_generation_prompt and all(turn.role != "assistant" for turn in turns):
            raise RejectedSample("no_answer", "nothing to learn from: no assistant turn")
        for turn in turns:
            if turn.role == "assistant" and not turn.text.strip():
                raise RejectedSample("empty_answer")
            if turn.role != "user" and IMAGE_TAG in turn.text:
                raise RejectedSample("image_tag_in_answer", f"<image> in a turn of role {turn.role}")
            for special in self._forbidden:
                if special in turn.text:
                    raise RejectedSample("special_token_in_text", f"{special!r} in a turn of role {turn.role}")

    def _tokenize(self, text: str, after: str = "") -> list[int]:
        ids: list[int] = []
        after = after.rpartition(IMAGE_TAG)[2]
        for number, chunk in enumerate(text.split(IMAGE_TAG)):
            if number:
                ids.append(IMAGE_TOKEN_ID)
                after = ""
            if chunk:
                ids += self._ids_after(after, chunk)
        return ids

    def _ids_after(self, before: str, text: str) -> list[int]:
        """Tokens of a text that goes on from another, never sharing a token with it.

        Llama's tokenizers put a space before whatever they are given, so what goes on must not be given alone.
        """
        if before and self._marks_first_word:
            ids, both = self._ids(before), self._ids(before + text)
            if both[: len(ids)] == ids:
                return both[len(ids) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        if text in self._known:
            return list(self._known[text])
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.truncation is None and backend.padding is None:
            ids = backend.encode(text, add_special_tokens=False).ids  # what the call below ends in, in half the time
        else:
            ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(text) <= MAX_KNOWN_LENGTH and len(self._known) < MAX_KNOWN:
            self._known[text] = tuple(ids)
        return ids

    def _find_end(self) -> str:
        if self.name == "plain":
            return PLAIN_END
        markup = MARKUPS.get(self.name)
        if markup is not None and markup.end is not None:
            if len(self._tokenize(markup.end)) != 1:
                raise ValueError(
                    f"chat_template={self.name} needs {markup.end!r} as one token, this tokenizer splits it; "
                    "choose another chat_template"
                )
            return markup.end
        if self.name == "backbone":
            return self._find_backbone_end()
        if self.tokenizer.eos_token is None:
            raise ValueError(f"chat_template={self.name} ends answers with the eos token, this tokenizer has none")
        return str(self.tokenizer.eos_token)

    def _find_backbone_end(self) -> str:
        """The special token that follows an answer in the tokenizer's own template (not always its eos token)."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                "this tokenizer has no chat template of its own; set processor.chat_template to chatml or vicuna_v1"
            )
        probe = "an answer to find"
        try:
            text = apply_template(self.tokenizer, [Turn("user", "a question"), Turn("assistant", probe)], False)
        except RejectedSample as error:
            raise ValueError(
                f"the tokenizer's chat template refuses a question and an answer ({error.detail}); set "
                "processor.chat_template to chatml or vicuna_v1"
            ) from None
        _, found, rest = text.partition(probe)
        ends = [(rest.find(special), special) for special in self._forbidden if special in rest]
        if not found or not ends:
            raise ValueError("the tokenizer's chat template closes no answer with a special token; set chat_template")
        return min(ends)[1]

    def _special_texts(self) -> list[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if getattr(token, "special", False)}
        return sorted((special | set(self.tokenizer.all_special_tokens)) - {IMAGE_TAG, ""})

    def _opening_ids(self) -> list[int]:
        """The tokens a tokenizer puts before every text (a BOS), unless its chat template writes them."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        if self.name == "backbone" or full == bare or full[: len(bare)] == bare:
            return []
        return full[: len(full) - len(bare)] if full[-len(bare) :] == bare else full[:1]
