"""What a session's folder says of itself: one line of JSON, and the digest of that line. FORMAT.md describes it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kvfold import __version__
from kvfold.config import PAGE_TOKENS, CacheSpec, SideSpec
from kvfold.errors import DamagedSession, InvalidConfig, SessionNotFound, WrongVersion
from kvfold.packing.layout import FORMAT_VERSION
from kvfold.sessions import files

NAME = "manifest.jsonl"
SESSION_VERSION = 1  # of the folder's format; pages have FORMAT_VERSION of their own
FILE_NAME = re.compile(r"(pages|state)-[0-9a-f-]{1,80}\.safetensors")
DIGEST_DIGITS = 32
MAX_BYTES = 64 << 20  # of a manifest: a session of 2^24 tokens in 1 MB segments has 6 MB


@dataclass(frozen=True)
class Segment:
    """A file of whole pages of every folded layer. Pages first .. first + pages - 1 of the session are its first `pages`
    of `stored`. index: digest of its tokens and page checksums."""

    file: str
    first: int
    pages: int
    stored: int
    index: str


@dataclass(frozen=True)
class State:
    """A file of all that is not in pages when a session is `length` tokens long and `folded` of them are. digest: of the file."""

    file: str
    length: int
    folded: int
    digest: str


@dataclass(frozen=True)
class Layer:
    """A layer of the cache. Folded ones say what their pages are made of; of others the state file has everything.

    head_dim: of keys, and of values unless value_dim says otherwise.
    """

    kind: str
    kv_heads: int = 0
    head_dim: int = 0
    dtype: str = ""
    page_bytes: int = 0
    value_dim: int = 0

    @property
    def dims(self) -> tuple[int, int]:
        """Of keys and of values."""
        return self.head_dim, self.value_dim or self.head_dim


@dataclass(frozen=True)
class Manifest:
    """model: named fingerprints. sampler: its numbers. notes: what the owner keeps with the session, any JSON."""

    spec: CacheSpec
    layers: list[Layer]
    model: dict[str, Any]
    segments: list[Segment]
    state: State
    checkpoints: list[State] = field(default_factory=list)
    profile: str = "custom"
    sampler: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    version: int = SESSION_VERSION
    page_version: int = FORMAT_VERSION
    writer: str = __version__

    @property
    def files(self) -> set[str]:
        return {s.file for s in self.segments} | {x.file for x in (self.state, *self.checkpoints)}

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest."""
        line = json.dumps(asdict(self), sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
        seal = json.dumps({"xxh3_128": files.digest(line)}).encode()
        files.write(folder / NAME, lambda path: path.write_bytes(line + b"\n" + seal + b"\n"))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises SessionNotFound, DamagedSession, or WrongVersion if a newer kvfold wrote it."""
        try:
            with (folder / NAME).open("rb") as file:
                content = file.read(MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SessionNotFound(f"no session at {folder}", "Check the name: kvfold sessions ls") from error
        line, _, seal = content.partition(b"\n")
        if seal != json.dumps({"xxh3_128": files.digest(line)}).encode() + b"\n":
            raise DamagedSession.at(f"{folder / NAME} does not agree with its checksum", 0)
        try:
            return cls._parse(json.loads(line))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, InvalidConfig) as error:
            raise DamagedSession.at(f"{folder / NAME} is not a manifest ({error})", 0) from error

    @classmethod
    def _parse(cls, data: dict[str, Any]) -> Manifest:
        for name, known in (("version", SESSION_VERSION), ("page_version", FORMAT_VERSION)):
            if data[name] > known:
                raise WrongVersion(
                    f"the session has {name.replace('_', ' ')} {data[name]}, this kvfold reads up to {known}",
                    f"Upgrade kvfold (it was written by {data.get('writer')})",
                )
        spec = data.pop("spec")
        manifest = cls(
            spec=CacheSpec(key=SideSpec(**spec.pop("key")), value=SideSpec(**spec.pop("value")), **spec),
            layers=[Layer(**x) for x in data.pop("layers")],
            segments=[Segment(**x) for x in data.pop("segments")],
            state=State(**data.pop("state")),
            checkpoints=[State(**x) for x in data.pop("checkpoints")],
            **data,
        )
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Raise ValueError unless files have names of ours and pages follow one another up to what the states need."""
        kinds = {"model": dict, "sampler": dict, "notes": dict, "profile": str, "writer": str}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} is not a {kind.__name__}")
        states, at = [*self.checkpoints, self.state], 0
        if not all(isinstance(s.index, str) and len(s.index) == DIGEST_DIGITS for s in self.segments):
            raise ValueError("the index of a segment is not a digest")
        counts = [
            n for x in (*self.segments, *states, *self.layers) for n in vars(x).values() if not isinstance(n, str)
        ]
        if not all(type(n) is int for n in counts):
            raise ValueError("a count is not a whole number")
        for s in self.segments:
            if s.first != at or not 0 < s.pages <= s.stored:
                raise ValueError(f"segment {s.file} does not begin at page {at}")
            at += s.pages
        for x in states:
            if not 0 <= x.folded <= x.length or not -(-x.folded // PAGE_TOKENS) <= at:
                raise ValueError(f"state {x.file} has {x.folded} of {x.length} tokens in {at} pages")
        if not all(FILE_NAME.fullmatch(name) for name in self.files):
            raise ValueError("a file name is not one of kvfold's")
        if any(
            x.kind == "folded" and not (x.kv_heads > 0 and x.head_dim > 0 and x.page_bytes > 0) for x in self.layers
        ):
            raise ValueError("a folded layer has no shape")

    @property
    def folded_layers(self) -> list[int]:
        return [i for i, x in enumerate(self.layers) if x.kind == "folded"]

    def upto(self, tokens: int) -> Manifest:
        """The session as it was at a checkpoint of so many tokens, or as it is at its end."""
        states = {x.length: x for x in (*self.checkpoints, self.state)}
        if tokens not in states:
            raise SessionNotFound(f"the session has no checkpoint at {tokens} tokens", f"It has {sorted(states)}")
        state = states[tokens]
        before = [x for x in self.checkpoints if x.length <= tokens]
        return replace(
            self, state=state, checkpoints=before, segments=self.first_pages(-(-state.folded // PAGE_TOKENS))
        )

    def first_pages(self, count: int) -> list[Segment]:
        """Segments of the first `count` pages; the last of them is used in part."""
        return [replace(s, pages=min(s.pages, count - s.first)) for s in self.segments if s.first < count]
