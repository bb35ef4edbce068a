"""Text to token windows and haystacks."""

from __future__ import annotations

import functools
import json
import lzma
from importlib import resources
from typing import Any

from kvfold.errors import EvaluationError

DOCUMENT_END = 1  # id that closes a document in the evaluation stream


def stream(text: str, tokenizer: Any, limit: int | None = None) -> list[int]:
    """Documents split at NUL, tokenized without special tokens, each closed by id 1, concatenated; at least `limit` long."""
    ids: list[int] = []
    for document in text.split("\0"):
        ids += tokenizer(document, add_special_tokens=False).input_ids
        ids.append(DOCUMENT_END)
        if limit is not None and len(ids) >= limit:
            break
    return ids


def windows(text: str, tokenizer: Any, count: int, tokens: int, skip: int) -> list[list[int]]:
    """Window i = tokens [tokens * (i + skip), tokens * (i + skip + 1)) of the stream, no begin token."""
    need = tokens * (count + skip)
    ids = stream(text, tokenizer, need)
    if len(ids) < need:
        raise EvaluationError(
            f"the text has {len(ids)} tokens, {need} are needed", "Use a longer text, or fewer or shorter windows"
        )
    return [ids[tokens * (i + skip) : tokens * (i + skip + 1)] for i in range(count)]


@functools.cache
def haystack() -> str:
    """The held-out documentation that ships with the package (Rust and Node.js docs), documents separated by NUL."""
    packed = resources.files("kvfold.evaluation").joinpath("data/heldout_docs.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")


@functools.cache
def words() -> list[str]:
    return resources.files("kvfold.evaluation").joinpath("data/words.txt").read_text(encoding="utf-8").split()


@functools.cache
def templates() -> dict[str, dict[str, str]]:
    """The four needle kinds: statement, question, answer."""
    raw = resources.files("kvfold.evaluation").joinpath("data/needle_templates.json").read_text(encoding="utf-8")
    return {t["name"]: t for t in json.loads(raw)}
