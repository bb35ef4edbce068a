"""Messages to tokens, through the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from kvfold.errors import BadPrompt, ChatTemplateMissing

Message = dict[str, str]  # role: system, user or assistant; content: text


def chat_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that the assistant is to continue.

    Raises ChatTemplateMissing, and BadPrompt for messages that the template refuses.
    """
    if not tokenizer.chat_template:
        raise ChatTemplateMissing(
            "this model has no chat template", "Start with --chat-template FILE, or complete plain text"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise BadPrompt(
            f"the model's chat template refuses these messages ({error})", "Change their roles or order"
        ) from error
    return tokenizer(_whole(text), add_special_tokens=False).input_ids


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, with the tokenizer's own special tokens. Raises BadPrompt for halves of characters."""
    return tokenizer(_whole(text)).input_ids


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadPrompt(f"character {error.start} is half of one (a lone surrogate)", "Send valid Unicode") from error
    return text
