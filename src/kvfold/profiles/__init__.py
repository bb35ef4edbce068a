"""Named choices as data: one TOML file per profile, loaded and validated here."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kvfold.config import TUNED, CacheSpec, SideSpec
from kvfold.errors import InvalidConfig, UnknownProfile

Rows = tuple[dict[str, Any], ...]
MEASURED = ("evidence", "needles", "sizes", "speeds")


@dataclass(frozen=True)
class Tolerance:
    """What `kvfold eval --gate` lets a profile lose: mean KL in nats at most, share of equal top tokens at least."""

    kld_mean: float
    top1_agreement: float

    def __post_init__(self) -> None:
        if not (self.kld_mean > 0 and 0 <= self.top1_agreement <= 1):
            raise InvalidConfig(f"tolerance {self} says nothing", "Give kld_mean > 0 and top1_agreement from 0 to 1")


@dataclass(frozen=True)
class Profile:
    """A CacheSpec with a name, the reason for it and what it may lose.

    base: the profile it differs from, if any. What was measured of it, rows that end with their `command`: evidence: per model,
    kld_mean and kld_se (nats), top1_agreement, bits_per_value. needles: per model and context, trials, recall and answer_nll
    (nats), each also of the 16-bit reference. sizes: how many times smaller a whole cache is. speeds: decode attention in ms,
    and how many times faster than the fastest over 16 bits.
    """

    name: str
    purpose: str
    spec: CacheSpec
    tolerance: Tolerance | None = None
    base: str | None = None
    evidence: Rows = ()
    needles: Rows = ()
    sizes: Rows = ()
    speeds: Rows = ()


def names() -> list[str]:
    """Profiles there are, in the order of their files' `rank`."""
    return sorted(_files(), key=lambda name: _read(name)["rank"])


def levels() -> list[str]:
    """Profiles that stand on their own, in the order of `rank`: those that name no `base`."""
    return [name for name in names() if "base" not in _read(name)]


@functools.cache
def _files() -> list[str]:
    return [f.name.removesuffix(".toml") for f in resources.files(__name__).iterdir() if f.name.endswith(".toml")]


@functools.cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8"))


def load(name: str) -> Profile:
    """The profile `name`, or the one in the file `name` if that ends with .toml (`kvfold tune` writes such files).

    Raises UnknownProfile with the names there are, and InvalidConfig for a file that cannot be read.
    """
    if name.endswith(".toml"):
        return parsed(name, _with_bases(_from_file(Path(name)), Path(name).parent))
    if name not in _files():
        raise UnknownProfile(f"unknown profile {name!r}", f"Use one of: {', '.join(names())}")
    return parsed(name, _read(name))


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(
            f"profile {path} cannot be read ({error})", "Give a TOML file or a profile's name"
        ) from error


def _with_bases(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`bases` names a file beside the profile: read, and its digest put where codec `tuned` is named."""
    if (name := content.pop("bases", None)) is None:
        return content
    from kvfold.codebook.basis import read

    digest = read(folder / str(name))
    sides = [s for s in ("key", "value") if isinstance(x := content.get(s), dict) and x.get("codec") == TUNED]
    return content | {s: {**content[s], "basis": digest} for s in sides}


def parsed(name: str, content: dict[str, Any]) -> Profile:
    """A profile from its TOML content; with `base`, keys it leaves out are the base's. Raises InvalidConfig."""
    base = content.get("base")
    data = _laid_over(_measured(_read(base), content), content) if base in levels() else dict(content)
    if base is not None and base not in levels():
        raise InvalidConfig(f"profile {name!r} has the unknown base {base!r}", f"Use one of: {', '.join(levels())}")
    for key in ("rank", "base"):
        data.pop(key, None)
    try:
        purpose, tolerance = data.pop("purpose"), data.pop("tolerance", None)
        measured = {kind: tuple(data.pop(kind, ())) for kind in MEASURED}
        limits = None if tolerance is None else Tolerance(**tolerance)
        spec = CacheSpec(key=SideSpec(**data.pop("key")), value=SideSpec(**data.pop("value")), **data)
    except (TypeError, KeyError) as error:
        raise InvalidConfig(
            f"profile {name!r} has an unknown key or lacks one ({error})", "Compare it with the other profiles"
        ) from error
    except InvalidConfig as error:
        raise type(error)(f"profile {name!r}: {error.message}", error.cure) from error
    return Profile(name, purpose, spec, limits, base, **measured)


def _measured(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The base, without what was measured of it where `own` changes what was measured."""
    changed = set(own) - {"rank", "base", "purpose", "tolerance"}
    return {k: v for k, v in base.items() if k not in MEASURED or not changed}


def _laid_over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _laid_over(base[k], own[k]) if k in base and isinstance(own.get(k), dict) else own.get(k, base.get(k))
        for k in {**base, **own}
    }
