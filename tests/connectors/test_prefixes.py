"""Folders of prefixes: whatever prompts were added, in whatever order and cut, the longest known beginning is found, whole."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.config import PAGE_TOKENS
from kvfold.connectors.prefixes import PrefixFolder
from kvfold.errors import StorageFailed
from kvfold.sessions.manifest import Layer

LAYERS = [Layer("folded", 1, 4, "float32", 24), Layer("folded", 1, 4, "float32", 16)]


def tokens_of(letters: str) -> list[int]:
    """A page of tokens per letter."""
    return [t for letter in letters for t in range(1000 * ord(letter), 1000 * ord(letter) + PAGE_TOKENS)]


def page(prefix: str, layer: int) -> torch.Tensor:
    """What a page holds depends on everything up to its end."""
    generator = torch.Generator().manual_seed(hash((prefix, layer)) % (1 << 62))
    return torch.randint(0, 256, (LAYERS[layer].page_bytes,), generator=generator, dtype=torch.uint8)


def add(folder: PrefixFolder, letters: str) -> None:
    """As a worker does: what is not known yet, in one file."""
    known = sum(p.pages for p in folder.find(tokens_of(letters), len(letters)))
    if known < len(letters):
        ends = range(known + 1, len(letters) + 1)
        pages = {i: torch.stack([page(letters[:e], i) for e in ends]) for i in range(2)}
        folder.add(tokens_of(letters), known, pages, {})


def read(folder: PrefixFolder, letters: str) -> int:
    """How many pages are found; they hold what was written."""
    pieces = folder.find([*tokens_of(letters), 7, 7], len(letters))
    at = 0
    for piece in pieces:
        assert piece.first == at
        for layer in range(2):
            rows: list[torch.Tensor] = []
            piece.file.pages(layer, lambda row, known, rows=rows: rows.append(row))
            for i in range(piece.pages):
                assert torch.equal(rows[i], page(letters[: at + i + 1], layer))
        at += piece.pages
    return at


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=6), st.text("abc", min_size=1, max_size=7))
def test_the_longest_known_beginning(added: list[str], asked: str) -> None:
    with tempfile.TemporaryDirectory() as where:
        folder = PrefixFolder(Path(where), LAYERS)
        for letters in added:
            add(folder, letters)
        common = [next((i for i, (a, b) in enumerate(zip(x, asked)) if a != b), min(len(x), len(asked))) for x in added]  # noqa: B905
        assert read(folder, asked) == max(common)
        assert read(PrefixFolder(Path(where), LAYERS), asked) == max(common)  # as another process finds it


def test_a_damaged_page_ends_what_is_found(tmp_path: Path) -> None:
    add(PrefixFolder(tmp_path, LAYERS), "abcd")
    (path,) = tmp_path.rglob("pages-*")
    content = bytearray(path.read_bytes())
    at = content.index(page("abc", 0).numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    folder = PrefixFolder(tmp_path, LAYERS)
    assert read(folder, "abcd") == 2
    assert not folder.find(tokens_of("abcd"), 4)[0].whole
    add(folder, "abcd")
    assert read(PrefixFolder(tmp_path, LAYERS), "abcd") == 4


def test_files_of_other_layers_and_cut_files_are_not_read(tmp_path: Path) -> None:
    add(PrefixFolder(tmp_path, LAYERS), "ab")
    assert PrefixFolder(tmp_path, LAYERS[:1] * 2).find(tokens_of("ab"), 2) == []
    (path,) = tmp_path.rglob("pages-*")
    path.write_bytes(path.read_bytes()[:-20])
    assert PrefixFolder(tmp_path, LAYERS).find(tokens_of("ab"), 2) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed):
        add(PrefixFolder(tmp_path / "file", LAYERS), "ab")
