"""What a store knows of each session, in memory or on the disk, and which of them a prompt could go on from."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.sessions.files import digest
from kvfold.sessions.session import Session

AUTOMATIC = "auto-"  # begins the names of sessions that nobody named: they serve as beginnings of others
COMPARED = 4096  # tokens compared at a time
Tokens = NDArray[np.int32]


@dataclass
class Counts:
    """What a store has done since it was made."""

    lookups: int = 0
    hits: int = 0
    reused_tokens: int = 0
    written_out: int = 0
    dropped: int = 0
    brought_back: int = 0

    def look_up(self, found: int) -> None:
        """A prompt was looked up, and so many of its tokens were found."""
        self.lookups += 1
        self.hits += found > 0
        self.reused_tokens += found


@dataclass
class Entry:
    """tokens, ways (lengths it can be forked at) and nbytes: as of its last release. saved: what of it the disk holds."""

    name: str
    session: Session | None = None
    in_use: bool = False
    used: int = 0  # the store's clock when it was last used
    tokens: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    ways: list[int] = field(default_factory=list)
    nbytes: int = 0
    saved: Any = None

    @property
    def automatic(self) -> bool:
        return self.name.startswith(AUTOMATIC)

    def note(self, tokens: Sequence[int], ways: Iterable[int], nbytes: int) -> None:
        self.tokens, self.ways, self.nbytes = np.asarray(tokens, np.int32), sorted(ways), nbytes

    def row(self) -> dict[str, Any]:
        """What a list of sessions says of this one; while it is in use, its bytes are those of its last release."""
        return {
            "name": self.name,
            "tokens": len(self.session.tokens) if self.session is not None else len(self.tokens),
            "bytes": self.nbytes,
            "in_memory": self.session is not None,
            "in_use": self.in_use,
        }

    def way(self, wanted: Tokens) -> int:
        """How much of `wanted`, short of its last token, a fork of this session can hold; 0 for nothing."""
        common = min(common_length(self.tokens, wanted), len(wanted) - 1)
        ways = self.ways
        if self.in_use:
            # It may move on under us; its checkpoints do not.
            ways = list(self.session.checkpoints) if self.session is not None else []
        return max((n for n in ways if n <= common), default=0)

    def continues(self, other: Entry) -> bool:
        """Whether this session begins with all of another's tokens."""
        return common_length(self.tokens, other.tokens) == len(other.tokens)

    def unsaved(self) -> Any:
        """What a save would write anew; None if the disk has it."""
        s = self.session
        if s is None:
            return None
        tokens = digest(np.asarray(s.tokens, np.int32).data)
        state = (tokens, s.sampler.state(), copy.deepcopy(s.notes), sorted(s.checkpoints))
        return None if state == self.saved else state


def common_length(a: Tokens, b: Tokens) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    for start in range(0, n, COMPARED):
        stop = min(n, start + COMPARED)
        differ = np.flatnonzero(a[start:stop] != b[start:stop])
        if len(differ):
            return start + int(differ[0])
    return n
