"""Which tuned form of a level a model is better off with on a text, if any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvfold.codebook.basis import SIDES, Bases, content, remember
from kvfold.config import TUNED, CacheSpec, SideSpec
from kvfold.errors import Unsupported
from kvfold.evaluation.contenders import Folded
from kvfold.evaluation.divergence import figures, score
from kvfold.profiles import Profile
from kvfold.tuning import allocation
from kvfold.tuning.statistics import Moments

Progress = Callable[[int, int], None]
Forms = dict[str, tuple[CacheSpec, bytes]]  # by name: a spec, and the file of its bases, if it has any
PLAIN = "plain"  # the level itself
TUNED_SIDES: dict[str, tuple[str, ...]] = {"tuned": SIDES, "tuned values": ("value",)}


@dataclass(frozen=True)
class Choice:
    """form: its name. spec: the cache's. data: the file of its bases, if it has any. rows: figures of every form."""

    form: str
    spec: CacheSpec
    data: bytes
    rows: list[dict[str, Any]]


def tuned(spec: CacheSpec, bases: Bases) -> tuple[CacheSpec, bytes]:
    """`spec` with the sides that `bases` are of in their channels, and the file of the bases, which are remembered."""
    data = content(bases)
    digest = remember(data)
    spec = replace(spec, graded=False, bits_by_layer=())  # bases say which layers get how many bits
    for side in {side for _, side in bases}:
        widths = [b.widths.float().mean() for (_, s), b in bases.items() if s == side]
        bits = round(float(sum(widths)) / len(widths), 4)
        own = SideSpec(TUNED, bits, getattr(spec, side).scale, basis=digest)
        spec = replace(spec, key=own) if side == "key" else replace(spec, value=own)
    return spec, data


def check(spec: CacheSpec) -> None:
    """Raises Unsupported for a spec without bits to share out."""
    if any(side.codec != "trellis" for side in (spec.key, spec.value)):
        raise Unsupported("only levels of trellis codes have a tuned form", "Use balanced, compact, extreme or ultra")


def by_channel(spec: CacheSpec, moments: dict[tuple[int, str], Moments]) -> Forms:
    """`spec` itself, and with its bits shared out among the channels of the model's own bases."""
    made = {PLAIN: (spec, b"")}
    for name, sides in TUNED_SIDES.items():
        bits = sum(getattr(spec, side).bits for side in sides) / len(sides)
        made[name] = tuned(spec, allocation.bases(moments, bits, sides))
    return made


def by_layer(spec: CacheSpec, moments: dict[tuple[int, str], Moments]) -> Forms:
    """`spec` itself, and with its bits shared out among layers, keys and values."""
    widths = allocation.by_layer(moments, (spec.key.bits + spec.value.bits) / 2)
    return {PLAIN: (spec, b""), "by layer": (replace(spec, graded=False, bits_by_layer=widths), b"")}


def choose(model: Any, made: Forms, judged: list[list[int]], progress: Progress = lambda done, total: None) -> Choice:
    """The form that loses least on windows `judged`, which what was measured must not be of."""
    contenders = [Folded(name, model.config, form) for name, (form, _) in made.items()]
    found = [figures(s) for s in score(model, judged, contenders, progress)]
    kept = ("kld_mean", "kld_se", "top1_agreement", "bits_per_value", "cache_bytes")
    rows = [{"form": n, **{k: f[k] for k in kept}} for n, f in zip(made, found, strict=True)]
    best = min(rows, key=lambda r: r["kld_mean"])["form"]
    return Choice(best, *made[best], rows)


def as_toml(level: Profile, choice: Choice, bases: str, where: str) -> str:
    """The chosen form as a profile on `level`, `bases` being the file beside it; what was measured in comments.

    What it may lose: what the level may, or twice what was measured if that is less.
    """
    found = next(r for r in choice.rows if r["form"] == choice.form)
    lines = [f"# Measured on {where}, KLD in nats:"]
    lines += [
        f"# {r['form']}: {r['kld_mean']:.5f} +- {r['kld_se']:.5f}, the same top token at {100 * r['top1_agreement']:.1f} %, "
        f"{r['bits_per_value']:.3f} bits per value"
        for r in choice.rows
    ]
    lines += [f'base = "{level.name}"', f'purpose = "{level.name} in the form that loses least here: {choice.form}."']
    if choice.data:
        lines += [f'bases = "{bases}"']
    if choice.spec.bits_by_layer:
        lines += ["bits_by_layer = [", *(f"    [{key:g}, {value:g}]," for key, value in choice.spec.bits_by_layer), "]"]
    for name, side in (("key", choice.spec.key), ("value", choice.spec.value)):
        if side.codec == TUNED:
            lines += ["", f"[{name}]", f'codec = "{TUNED}"', f"bits = {side.bits!r}"]
    most = 2 * found["kld_mean"] if level.tolerance is None else min(2 * found["kld_mean"], level.tolerance.kld_mean)
    least = 0.0 if level.tolerance is None else level.tolerance.top1_agreement
    lines += ["", "[tolerance]", f"kld_mean = {most:.3g}", f"top1_agreement = {least!r}"]
    return "\n".join(lines) + "\n"
