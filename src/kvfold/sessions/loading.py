"""A session from its folder: every byte that is used was checked, and what is whole can be had without the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvfold.adapters.hf_state import fill
from kvfold.adapters.hf_transformers import FoldedCache, FoldedLayer
from kvfold.config import PAGE_TOKENS
from kvfold.errors import DamagedSession, WrongModel
from kvfold.sessions import files, fingerprint
from kvfold.sessions.content import Content
from kvfold.sessions.manifest import Manifest
from kvfold.sessions.runner import Runner
from kvfold.sessions.sampler import Sampler
from kvfold.sessions.saving import Saved, describe


@dataclass
class Restored:
    """What a folder held, ready to go on."""

    cache: FoldedCache
    tokens: list[int]
    sampler: Sampler
    notes: dict[str, Any]
    checkpoints: dict[int, FoldedCache]
    saved: Saved


def load(runner: Runner, folder: Path, undamaged: bool = False, upto: int | None = None) -> Restored:
    """The session in a folder, as it was when it was saved.

    undamaged: of a damaged one, the longest beginning that is whole. upto: length of a checkpoint to restore instead of the
    end. Raises SessionNotFound, WrongModel, WrongVersion and DamagedSession.
    """
    with files.locked(folder, alone=False):
        made = Manifest.read(folder)
        if upto is not None:
            made = made.upto(upto)
        fingerprint.check(made.model, runner.fingerprint)
        cache = runner.new_cache()
        _check_layers(made, cache)
        pages: dict[int, list[int]] = {i: [] for i in made.folded_layers}

        def adopt(i: int, row: Tensor, digest: bytes) -> None:
            pages[i].append(cache.layers[i].folded.adopt(row, digest))

        try:
            content = Content.of(folder, made, adopt)
            if not undamaged or not content.longest:
                content.check()
            return _Assembly(runner, content, pages).restored(folder, cache)
        finally:
            # Sequences took references of their own.
            for i, own in pages.items():
                for page in own:
                    cache.layers[i].folded.pool.release(page)


def _check_layers(made: Manifest, cache: FoldedCache) -> None:
    if made.spec != cache.spec:
        raise WrongModel(
            f"the session was folded with profile {made.profile!r} and other settings than asked for",
            f"Load it with profile {made.profile!r}" if made.profile != "custom" else "Load it with its own spec",
        )
    now = [describe(x) for x in cache.layers]
    for i, (then, here) in enumerate(zip(made.layers, now, strict=False)):
        if then != here:
            raise WrongModel(f"layer {i} was {then}, and is {here}", "Load the model, in the dtype, it was made with")
    if len(now) != len(made.layers):
        raise WrongModel(
            f"the session has {len(made.layers)} layers, the model {len(now)}", "Load the model it was made with"
        )


class _Assembly:
    """Caches from what was read. pages: by layer, the pool's pages for the session's."""

    def __init__(self, runner: Runner, content: Content, pages: dict[int, list[int]]) -> None:
        self.runner, self.content, self.pages = runner, content, pages

    def restored(self, folder: Path, cache: FoldedCache) -> Restored:
        made, length = self.content.made, self.content.longest
        fill_cache = self._fill if length in self.content.states else self._fill_pages
        tokens = fill_cache(cache, length)
        known = {x.length: x for x in made.checkpoints if x.length in self.content.states}
        saved = Saved(folder, made.first_pages(-(-length // PAGE_TOKENS)), known)
        checkpoints = {}
        for n in known:
            point = self.runner.new_cache()
            self._fill(point, n)
            checkpoints[n] = point.fork(compact=True)
        return Restored(cache, tokens, _sampler(made), made.notes, checkpoints, saved)

    def _fill(self, cache: FoldedCache, length: int) -> list[int]:
        """An empty cache becomes the one of a state file; returns its tokens."""
        state, tensors, numbers = self.content.states[length]
        for i, x in enumerate(cache.layers):
            own = {n.removeprefix(f"layers.{i}."): t for n, t in tensors.items() if n.startswith(f"layers.{i}.")}
            own = {n: t.to(self.runner.devices[i], copy=True) for n, t in own.items()}
            if isinstance(x, FoldedLayer):
                self._fill_layer(x, i, length, state.folded, (own.pop("keys"), own.pop("values")))
            if str(i) in numbers:
                fill(x, own, numbers[str(i)])
        return self.content.tokens[: state.folded // PAGE_TOKENS * PAGE_TOKENS] + tensors["tokens"].tolist()

    def _fill_pages(self, cache: FoldedCache, length: int) -> list[int]:
        """An empty cache gets whole pages and nothing else, as a trim into pages would leave it."""
        for i, x in enumerate(cache.layers):
            s = x.folded.sequences[0]
            self._fill_layer(x, i, length, length, (s.ring_k[:, :0], s.ring_v[:, :0]))
        return self.content.tokens[:length]

    def _fill_layer(self, layer: FoldedLayer, i: int, length: int, folded: int, exact: tuple[Tensor, Tensor]) -> None:
        s = layer.folded.sequences[0]
        rest = self.content.rest.get(i, {}) if folded else {}
        for sinks, x in zip((s.sinks_k, s.sinks_v), _pair(rest, "sink") if folded else exact, strict=True):
            n = min(x.shape[1], sinks.shape[1])
            sinks[:, :n] = x[:, :n]
        k, v = (rest[n].to(s.ring_k.device, copy=True) if n in rest else None for n in ("state_keys", "state_values"))
        ids = self.pages[i][: -(-folded // PAGE_TOKENS)]
        for page in ids:
            s.pool.retain(page)
        s.restore(ids, length, folded, exact, (k, v))
        s.mark()
        layer.columns = length


def _pair(rest: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return rest[f"{name}_keys"], rest[f"{name}_values"]


def _sampler(made: Manifest) -> Sampler:
    try:
        return Sampler(**made.sampler)
    except TypeError as error:
        raise DamagedSession.at(f"the sampler's state is malformed ({error})", 0) from error
