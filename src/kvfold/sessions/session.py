"""One conversation: its tokens, a cache of one row that holds them, and the state of its sampler."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kvfold import profiles
from kvfold.adapters.hf_transformers import FoldedCache
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.errors import CacheMisuse, CannotTrim, InvalidInput
from kvfold.sessions.loading import load
from kvfold.sessions.manifest import Manifest
from kvfold.sessions.runner import Runner
from kvfold.sessions.sampler import Sampler
from kvfold.sessions.saving import Saved, save
from kvfold.sessions.segments import checksum


class Session:
    """`tokens` are those the cache holds, in order. A token that was picked but not fed yet is not among them."""

    def __init__(
        self,
        runner: Runner,
        cache: FoldedCache | None = None,
        tokens: Sequence[int] = (),
        sampler: Sampler | None = None,
    ) -> None:
        self.runner = runner
        self.name = ""  # a store's; empty outside of stores
        self.cache = cache if cache is not None else runner.new_cache()
        self.tokens = list(tokens)
        self.sampler = sampler if sampler is not None else Sampler()
        self.notes: dict[str, Any] = {}  # whatever the owner keeps with the session; JSON
        self.checkpoints: dict[int, FoldedCache] = {}  # compact copies of the cache, by their length
        self.landmark = 0  # the last checkpoint up to here is kept, too
        self.saved = Saved()

    @classmethod
    def new(
        cls,
        model: Any,
        tokenizer: Any = None,
        profile: str = "balanced",
        *,
        spec: CacheSpec | None = None,
        backend: str = "auto",
        sampler: Sampler | None = None,
    ) -> Session:
        """An empty session of a transformers model, which gets attached. Sessions of one Runner share page pools."""
        return cls(Runner(model, tokenizer, profile, spec=spec, backend=backend), sampler=sampler)

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Feed tokens in calls on the runner's grid; logits [V] after the last. A call that fails leaves those before it."""
        tokens = list(tokens)
        self.check()
        if not tokens:
            raise InvalidInput("there are no tokens to feed", "Pass at least one token")
        for part in self.runner.calls(len(self.tokens), tokens):
            with self.runner.room([self], len(part), checkpoints=min(1, self.runner.ways_back)):
                try:
                    logits = self.runner.forward(self.cache, part)
                except BaseException:
                    self.runner.undo(self.cache, len(self.tokens))
                    raise
                self.tokens += part
                if self.runner.ways_back:
                    self.checkpoint()
                    self._thin()
        return logits

    def _thin(self) -> None:
        """Keep as many checkpoints as the runner wants: the first, the last, and between them what spaces them most evenly
        on a logarithmic scale of their distance from the end, where most conversations part."""
        end = len(self.tokens) + 1
        landmark = max((n for n in self.checkpoints if n <= self.landmark), default=0)
        while len(at := sorted({*self.checkpoints} - {landmark})) > max(2, self.runner.ways_back):
            gaps = {b: (end - a) / (end - c) for a, b, c in zip(at, at[1:], at[2:], strict=False)}
            del self.checkpoints[min(gaps, key=gaps.__getitem__)]

    def share(self) -> None:
        """Let whole pages of other sessions in these pools stand for this one's equal ones, and the other way round."""
        for cache in (self.cache, *self.checkpoints.values()):
            for layer in cache.folded_layers:
                s = layer.folded.sequences[0]
                for n, page in enumerate(s.pages[: s.folded // PAGE_TOKENS]):
                    if not s.pool.is_shared(page):
                        s.pages[n] = s.pool.share(page, checksum(layer.folded.canonical(page)))

    def close(self) -> None:
        """Give all memory back; the session must not be used afterwards."""
        self.cache.reset()
        self.checkpoints = {}  # forks may have them, too

    def check(self) -> None:
        """Raise CacheMisuse if the cache is in use, or holds a call that failed and could not be taken back."""
        self.cache.guard.check()
        if (held := self.cache.get_seq_length()) != len(self.tokens):
            raise CacheMisuse(
                f"a call failed and could not be taken back: the cache holds {held} tokens, the session {len(self.tokens)}",
                "Continue from a fork or a saved copy made before it",
            )

    def fork(self) -> Session:
        """An independent continuation that shares folded pages."""
        self.check()
        return self._copy(self.cache.fork(), len(self.tokens))

    def prefix(self, tokens: int) -> Session | None:
        """A fork that holds as many of the first `tokens` tokens as this session can go back to exactly: to its end or to a
        checkpoint. None if there is no such place."""
        if tokens >= len(self.tokens):
            return self.fork()
        length = max((n for n in self.checkpoints if n <= tokens), default=0)
        return self._copy(self.checkpoints[length].fork(), length) if length else None

    def _copy(self, cache: FoldedCache, length: int) -> Session:
        other = Session(self.runner, cache, self.tokens[:length], copy.copy(self.sampler))
        other.notes = copy.deepcopy(self.notes)
        other.checkpoints = {n: c for n, c in self.checkpoints.items() if n <= length}
        other.saved = self.saved.upto(length)
        return other

    def trim(self, tokens: int) -> None:
        """Forget the newest tokens. Where a layer does not keep what it would need to go back (running states, full sliding
        windows), return to the last checkpoint before that place and read the tokens since again. Raises CannotTrim if
        there is none; the session is then as it was."""
        if not 0 <= tokens <= len(self.tokens):
            raise CannotTrim(f"cannot trim {tokens} of {len(self.tokens)} tokens", "Trim at most what there is")
        length = len(self.tokens) - tokens
        try:
            self.cache.crop(-tokens)
        except CannotTrim:
            at = max((n for n in self.checkpoints if n <= length), default=0)
            if length and not at:
                raise
            self._return(at, length)
        del self.tokens[length:]
        self.checkpoints = {n: c for n, c in self.checkpoints.items() if n <= length}
        self.saved = self.saved.upto(length)

    def _return(self, at: int, length: int) -> None:
        """Go back to the checkpoint at `at`, or to nothing, and read on up to `length`."""
        cache, tokens = self.cache, self.tokens
        self.cache, self.tokens = self.checkpoints[at].fork() if at else self.runner.new_cache(), tokens[:at]
        try:
            if again := tokens[at:length]:
                self.extend(again)
        except BaseException:
            self.cache, self.tokens = cache, tokens
            raise
        cache.reset()

    def checkpoint(self) -> None:
        """Keep what is needed to come back to this length: exact tokens and running states; pages are shared."""
        self.check()
        self.checkpoints[len(self.tokens)] = self.cache.fork(compact=True)

    def save(self, folder: str | Path) -> None:
        """Write the session to a folder of its own; what was saved there before and still holds is not written again.

        When it returns, the session is on the disk; when it does not, what was there before is still whole. Raises
        SessionExists if the folder holds something else, StorageFailed if the system refuses.
        """
        self.check()
        self.saved = save(self, Path(folder))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: Any,
        tokenizer: Any = None,
        *,
        backend: str = "auto",
        undamaged: bool = False,
    ) -> Session:
        """The session in a folder, with the model it was made with; it continues as it would have.

        undamaged: of a damaged session, the longest beginning that is whole. Raises SessionNotFound, WrongModel,
        WrongVersion, and DamagedSession, which says how long that beginning is.
        """
        made = Manifest.read(Path(folder))
        known = made.profile in profiles.names() and profiles.load(made.profile).spec == made.spec
        how = {"profile": made.profile} if known else {"spec": made.spec}
        return cls.restored(Runner(model, tokenizer, backend=backend, **how), folder, undamaged)

    @classmethod
    def restored(cls, runner: Runner, folder: str | Path, undamaged: bool = False, upto: int | None = None) -> Session:
        """`load` for a runner that there is already: pages lie in its pools, and those it holds already are shared.

        upto: length of a checkpoint to restore instead of the end.
        """
        found = load(runner, Path(folder), undamaged, upto)
        session = cls(runner, found.cache, found.tokens, found.sampler)
        session.notes, session.checkpoints, session.saved = found.notes, found.checkpoints, found.saved
        return session

    @property
    def nbytes(self) -> int:
        """Bytes this session needs: its own pages, shared or not, its exact tokens, tables, running states, checkpoints."""
        return self.cache.used_bytes + sum(c.unshared_bytes for c in self.checkpoints.values())

    def report(self) -> dict[str, Any]:
        return self.cache.report(self.runner.model)
