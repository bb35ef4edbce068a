"""What a session's folder holds, read and checked: pages in order up to the first that is damaged, and every state file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.config import PAGE_TOKENS
from kvfold.errors import DamagedSession
from kvfold.sessions.manifest import Manifest, State
from kvfold.sessions.segments import PageFile, Tensors, read_state

Use = Callable[[int, Tensor, bytes], object]  # layer, bytes of its next page in canonical order, their checksum


@dataclass
class Content:
    """pages: how many each folded layer has whole. tokens: of those segments that are. rest: what lies beside page 0, by
    layer. states: by length, the file's record, tensors and numbers. damage: the first thing found wrong."""

    made: Manifest
    pages: dict[int, int]
    tokens: list[int] = field(default_factory=list)
    rest: dict[int, Tensors] = field(default_factory=dict)
    states: dict[int, tuple[State, Tensors, dict[str, Any]]] = field(default_factory=dict)
    damage: str = ""

    @classmethod
    def of(cls, folder: Path, made: Manifest, use: Use) -> Content:
        """Read a folder; `use` gets every whole page that comes before the first damaged one of its layer."""
        out = cls(made, dict.fromkeys(made.folded_layers, 0))
        for segment in made.segments:
            try:
                file = PageFile(folder, segment, made.layers)
            except DamagedSession as error:
                out.damage = error.message
                break
            out.tokens += file.tokens.tolist()
            if segment.first == 0:
                out.rest = {i: file.rest(i) for i in out.pages}
            for i in out.pages:
                out._read_layer(file, i, use)
            if out.damage:
                break
        for state in (*made.checkpoints, made.state):
            try:
                if -(-state.folded // PAGE_TOKENS) <= out.whole:
                    out.states[state.length] = (state, *_checked(folder, state, made))
            except DamagedSession as error:
                out.damage = out.damage or error.message
        return out

    def _read_layer(self, file: PageFile, layer: int, use: Use) -> None:
        good = file.pages(layer, lambda row, digest: use(layer, row, digest))
        self.pages[layer] += good
        if good < file.segment.pages and not self.damage:
            name, page = file.segment.file, file.segment.first + good
            self.damage = f"page {page} of layer {layer} in {name} does not agree with its checksum"

    @classmethod
    def tokens_of(cls, folder: Path, made: Manifest) -> list[int]:
        """A session's tokens alone. Raises DamagedSession."""
        tokens: list[int] = []
        for segment in made.segments:
            tokens += PageFile(folder, segment, made.layers).tokens.tolist()
        last, _ = _checked(folder, made.state, made)
        return tokens[: made.state.folded // PAGE_TOKENS * PAGE_TOKENS] + last["tokens"].tolist()

    @property
    def whole(self) -> int:
        """Leading pages that every layer has."""
        return min(self.pages.values(), default=0)

    @property
    def longest(self) -> int:
        """Tokens that can be restored: up to a state, or, if every layer folds, up to the end of a whole page."""
        best = max(self.states, default=0)
        cut = min(self.whole, self.made.state.folded // PAGE_TOKENS) * PAGE_TOKENS
        only_pages = len(self.pages) == len(self.made.layers) and cut > self.made.spec.sinks
        return max(best, cut) if only_pages else best

    def check(self) -> None:
        """Raise DamagedSession if anything is not as it was written."""
        if self.damage:
            raise DamagedSession.at(self.damage, self.longest)


def _checked(folder: Path, state: State, made: Manifest) -> tuple[Tensors, dict[str, Any]]:
    """A state file's content, if it is of the right shape."""
    tensors, numbers = read_state(folder, state)
    least, most = state.length - state.folded, min(state.length, made.spec.ring_tokens())
    for i in made.folded_layers:
        x = made.layers[i]
        k, v = (tensors.get(f"layers.{i}.{name}", torch.empty(0)) for name in ("keys", "values"))
        fits = k.dim() == v.dim() == 3 and k.dtype == v.dtype == getattr(torch, x.dtype, None)
        shapes = [(x.kv_heads, k.shape[1], dim) for dim in x.dims] if fits else []
        if [tuple(k.shape), tuple(v.shape)] != shapes or not least <= k.shape[1] <= most:
            raise DamagedSession.at(f"{state.file} has keys of shape {list(k.shape)} in layer {i}", 0)
    if len(tensors.get("tokens", ())) != state.length - state.folded // PAGE_TOKENS * PAGE_TOKENS:
        raise DamagedSession.at(f"{state.file} lacks tokens", 0)
    return tensors, numbers
