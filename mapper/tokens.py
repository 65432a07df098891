"""Text in and out through the tokenizer beside a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mapper.errors import ModelError, UsageError

MAX_TOKENIZER_BYTES = 64 << 20
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Tokens:
    """Text <-> token ids. Without a tokenizer a token's text is its number."""

    tokenizer: Any = None

    @classmethod
    def beside(cls, model: Path) -> Tokens:
        """The tokenizer.json in the model's folder. Raises UsageError where there is none, ModelError."""
        path = model.parent / "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"no tokenizer.json beside {model}; give --ids instead of --prompt")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ModelError(f"{path} is larger than {MAX_TOKENIZER_BYTES} bytes")
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises UsageError where there are none."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise UsageError("the prompt is empty")
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`; a character whose bytes are not complete yet is left out."""
        return self.decode(ids).rstrip(_INCOMPLETE)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with replacement characters for bytes that are none."""
        if self.tokenizer is None:
            return "".join(f"{i} " for i in ids)
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


@dataclass
class Reader:
    """Text of tokens as they come, after `ids`. Each is decoded with the few before it, not with all."""

    words: Tokens
    ids: list[int]
    _begin: int = field(init=False)
    _end: int = field(init=False)

    def __post_init__(self) -> None:
        self._begin, self._end = max(len(self.ids) - _BEFORE, 0), len(self.ids)

    def add(self, token: int) -> str:
        """The text that a token adds; none while the bytes of a character are not complete."""
        self.ids.append(token)
        before = self.words.decode(self.ids[self._begin : self._end])
        after = self.words.decode(self.ids[self._begin :])
        if after.endswith(_INCOMPLETE) or len(after) <= len(before):
            return ""
        self._begin, self._end = self._end, len(self.ids)
        return after[len(before) :]


_BEFORE = 8
"""Tokens of the prompt that the first one is decoded with."""


def end_tokens(model: Path, words: Tokens) -> frozenset[int]:
    """The ids that end a text, as generation_config.json or config.json beside the model name them
    (eos_token_id), else tokenizer_config.json by text (eos_token); empty where none does."""
    for name in ("generation_config.json", "config.json"):
        found = _fields(model.parent / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if found is not None and all(type(i) is int for i in ids):
            return frozenset(ids)
    named = _fields(model.parent / "tokenizer_config.json").get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    known = words.tokenizer.token_to_id(text) if words.tokenizer and isinstance(text, str) else None
    return frozenset() if known is None else frozenset([known])


def _fields(file: Path) -> dict[str, Any]:
    """A JSON object in a file; empty where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
