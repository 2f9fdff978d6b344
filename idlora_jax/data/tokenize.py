"""Prompts -> token ids and mask, with the `tokenizer.json` of a Gemma folder.

A prompt is stripped, tokenised, truncated, framed by the file's own post-processor
(Gemma: a beginning-of-sequence token) and padded on the left to a fixed length, so that
no prompt changes a compiled shape. Nothing is downloaded.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from idlora_jax.weights import hub_folder

LENGTH = 1024
"""Tokens of a prompt that LTX-2 was trained with."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer (its file's own padding and truncation off) and how to pad.

    Attributes:
        tokenizer: as read from `tokenizer.json`.
        pad: id of the padding token.
        length: S, tokens of a prompt: the folder's `model_max_length`, at most 1024.
    """

    tokenizer: Tokenizer
    pad: int
    length: int = LENGTH


def _json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _pad_id(folder: pathlib.Path, tokenizer: Tokenizer) -> int:
    """The id of the padding token, else of the end token, else 0."""
    names = ("tokenizer_config.json", "special_tokens_map.json")
    files = [_json(folder / name) for name in names]
    for key in ("pad_token", "eos_token"):
        for file in files:
            token = file.get(key)
            text = token.get("content") if isinstance(token, dict) else token
            if text is None:
                continue
            found = tokenizer.token_to_id(text)
            if found is None:
                raise ValueError(
                    f"{folder}: {key} {text!r} is not in the vocabulary of "
                    "tokenizer.json; take both files from one download"
                )
            return found
    return 0


def _length(folder: pathlib.Path) -> int:
    """The folder's own limit, which published folders set beyond any prompt."""
    limit = _json(folder / "tokenizer_config.json").get("model_max_length", LENGTH)
    return min(LENGTH, int(limit))


def load(folder: str | pathlib.Path) -> TextTokenizer:
    """Read `tokenizer.json`, padding token and prompt length of a Gemma folder.

    Where it is absent, `tokenizer/` in the folder or beside it is looked at.

    Raises:
        ValueError: if the folder lacks `tokenizer.json`, or the files disagree.
    """
    folder = hub_folder.tokenizer_folder(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"tokenizer.json not found in {folder}; it is published beside config.json "
            "in the text encoder's folder (google/gemma-3-12b-it): copy it there (a "
            "tokenizer.model is not read)"
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TextTokenizer(tokenizer, _pad_id(folder, tokenizer), _length(folder))


def encode(
    tokenizer: TextTokenizer, prompts: Sequence[str], length: int | None = None
) -> tuple[Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """Token ids (int32) and mask (True for tokens), padded on the left to `length`.

    Args:
        tokenizer: as from `load`.
        prompts: texts; white space around them is dropped.
        length: S, default the tokenizer's; longer prompts lose their end.

    Raises:
        ValueError: if `prompts` is a single text, or `length` leaves no room.

    Source: ltx_core/text_encoders/gemma/tokenizer.py: LTXVGemmaTokenizer.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts, got one: [{prompts!r}]")
    length = tokenizer.length if length is None else length
    inner = tokenizer.tokenizer
    room = length - inner.num_special_tokens_to_add(is_pair=False)
    if room < 1:
        raise ValueError(f"length must exceed {length - room}, got {length}")
    texts = [prompt.strip() for prompt in prompts]
    ids = np.full((len(texts), length), tokenizer.pad, np.int32)
    mask = np.zeros((len(texts), length), bool)
    plain = inner.encode_batch(texts, add_special_tokens=False)
    for row, encoding in enumerate(plain):
        encoding.truncate(room)
        framed = inner.post_process(encoding).ids
        start = length - len(framed)
        ids[row, start:], mask[row, start:] = framed, True
    return ids, mask
