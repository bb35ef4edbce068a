"""Text of an answer as it arrives: whole characters, stop strings held back, nothing lost."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kvfold.errors import BadPrompt, ChatTemplateMissing, Unsupported
from kvfold.loading import demo_folder
from kvfold.serving.prompts import chat_tokens, text_tokens
from kvfold.serving.text import AnswerText


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_folder())


def ids_of(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False).input_ids


def whole(text: AnswerText, tokens: list[int]) -> tuple[list[str], str]:
    """Pieces until a stop string, and their sum with what is released at the end."""
    pieces = []
    for t in tokens:
        pieces.append(text.push(t))
        if text.stopped:
            break
    return pieces, "".join(pieces) + text.finish()


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_pieces_add_up_to_the_text_and_hold_whole_characters(text: str) -> None:
    tokens = ids_of(text)
    pieces, out = whole(AnswerText(tokenizer(), [], []), tokens)
    assert out == tokenizer().decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in p for p in pieces if "\ufffd" not in text)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(3, 4000), max_size=60))
def test_any_tokens_give_what_decoding_them_at_once_gives(tokens: list[int]) -> None:
    """Up to a last character that is not complete, which a stream does not show."""
    _, out = whole(AnswerText(tokenizer(), [], []), tokens)
    assert tokenizer().decode(tokens, skip_special_tokens=True).startswith(out)


WORDS = st.text("abé \n", max_size=40)


@settings(max_examples=200, deadline=None)
@given(WORDS, st.lists(st.text("abé \n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    tokens = ids_of(text)
    streamed = AnswerText(tokenizer(), [], stops)
    pieces, out = whole(streamed, tokens)
    assert streamed.stopped == any(s in text for s in stops)
    # Nothing that belongs to a stop string was shown, and nothing before it was kept.
    assert not any(s in out for s in stops)
    assert text.startswith(out)
    if streamed.stopped:
        assert any(text.startswith(s, len(out)) for s in stops)
    else:
        assert out == text
    for n in range(len(pieces) + 1):
        assert out.startswith("".join(pieces[:n]))


def test_a_possible_stop_string_is_held_back_until_it_is_decided() -> None:
    text = AnswerText(tokenizer(), [], ["END"])
    seen = "".join(text.push(t) for t in ids_of("x E"))
    assert seen == "x "
    assert "".join(text.push(t) for t in ids_of("N")) == ""
    assert "".join(text.push(t) for t in ids_of("O")) == "ENO"


def test_special_tokens_are_no_text() -> None:
    text = AnswerText(tokenizer(), [], [])
    assert "".join(text.push(t) for t in [*ids_of("a"), tokenizer().eos_token_id, *ids_of("b")]) == "ab"


def test_a_tokenizer_without_a_fast_form_is_refused() -> None:
    with pytest.raises(Unsupported, match="object cannot decode token by token"):
        AnswerText(object(), [], [])


def test_messages_go_through_the_template() -> None:
    own = AutoTokenizer.from_pretrained(demo_folder())
    own.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert own.decode(chat_tokens(own, [{"role": "user", "content": "hi"}])) == "<user>hi<assistant>"
    with pytest.raises(BadPrompt, match="no system"):
        chat_tokens(own, [{"role": "system", "content": "x"}])
    own.chat_template = None
    with pytest.raises(ChatTemplateMissing, match="--chat-template"):
        chat_tokens(own, [{"role": "user", "content": "hi"}])
    assert text_tokens(own, "hi there") == ids_of("hi there")
