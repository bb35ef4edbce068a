"""Named choices as data: one TOML file per profile, loaded and validated here."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from kvfold.config import CacheSpec, SideSpec
from kvfold.errors import InvalidConfig, UnknownProfile


@dataclass(frozen=True)
class Profile:
    """A CacheSpec with a name and the reason for it."""

    name: str
    purpose: str
    spec: CacheSpec


def names() -> list[str]:
    """Profiles there are, in the order of their files' `rank`."""
    return [p.name for p in sorted(map(load, _files()), key=lambda p: _read(p.name)["rank"])]


def _files() -> list[str]:
    return [f.name.removesuffix(".toml") for f in resources.files(__name__).iterdir() if f.name.endswith(".toml")]


@functools.cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8"))


@functools.cache
def load(name: str) -> Profile:
    """The profile `name`; raises UnknownProfile with the names there are."""
    if name not in _files():
        raise UnknownProfile(f"unknown profile {name!r}", f"Use one of: {', '.join(names())}")
    data = dict(_read(name))
    purpose = data.pop("purpose")
    data.pop("rank")
    try:
        spec = CacheSpec(key=SideSpec(**data.pop("key")), value=SideSpec(**data.pop("value")), **data)
    except TypeError as error:
        raise InvalidConfig(
            f"profile {name!r} has an unknown key ({error})", "Compare it with the other profiles"
        ) from error
    return Profile(name, purpose, spec)
