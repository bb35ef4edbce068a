"""Does a profile keep what it promises, on this model and this text; and which is the smallest that does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvfold.errors import EvaluationError, InvalidConfig, UnsupportedHeadDim
from kvfold.evaluation.divergence import Progress, evaluate
from kvfold.planner.architecture import read
from kvfold.planner.plan import Setting, plan
from kvfold.profiles import Profile, Tolerance, levels, load

# An evaluation's own noise: a limit counts as kept if the figure less this many standard errors keeps it.
STANDARD_ERRORS = 2


def failures(result: dict[str, Any], tolerance: Tolerance) -> list[str]:
    """What in an `evaluate` result breaks `tolerance`, in words; empty when it is kept."""
    out = []
    if result["kld_mean"] - STANDARD_ERRORS * result["kld_se"] > tolerance.kld_mean:
        out.append(f"kld_mean {result['kld_mean']:.5f} is over {tolerance.kld_mean:g}")
    agreed, n = result["top1_agreement"], result["positions"]
    if agreed + STANDARD_ERRORS * (agreed * (1 - agreed) / n) ** 0.5 < tolerance.top1_agreement:
        out.append(f"top1_agreement {agreed:.4f} is under {tolerance.top1_agreement:g}")
    return out


def stated(profile: Profile) -> Tolerance:
    """The profile's tolerance; raises InvalidConfig if it states none."""
    if profile.tolerance is None:
        raise InvalidConfig(f"profile {profile.name!r} states no tolerance", f"Use one of: {', '.join(gated())}")
    return profile.tolerance


def smallest(
    model: Any, windows: list[list[int]], limits: Tolerance, progress: Progress = lambda done, total: None
) -> tuple[str, list[dict[str, Any]]]:
    """(the level with the fewest bits that keeps `limits`, a row per level tried). From the smallest up; levels that
    state no tolerance are there for comparison and are not tried. Raises EvaluationError if none keeps it."""
    rows = []
    for name in _by_bits(gated()):
        try:
            rows.append(_row(model, windows, name, limits, progress))
        except UnsupportedHeadDim:  # heads of this size have no such codes
            continue
        if rows[-1]["passed"]:
            return name, rows
    raise EvaluationError(
        f"no profile keeps kld_mean {limits.kld_mean:g} and top1_agreement {limits.top1_agreement:g} on this text",
        f"Allow more; the best was {min(r['kld_mean'] for r in rows):.5f}",
    )


def closest(
    model: Any,
    windows: list[list[int]],
    fitting: dict[str, int],
    limits: Tolerance | None,
    progress: Progress = lambda done, total: None,
) -> tuple[str, list[dict[str, Any]]]:
    """(the level of `fitting` with the least mean KL, a row per level). limits: None for each level's own.

    Raises EvaluationError if even that one does not keep `limits`.
    """
    rows = [
        {**_row(model, windows, name, limits or stated(load(name)), progress), "planned_bytes": fitting[name]}
        for name in _by_bits(fitting)
    ]
    best = min(rows, key=lambda r: r["kld_mean"])
    if limits is not None and not best["passed"]:
        raise EvaluationError(
            f"what fits does not keep kld_mean {limits.kld_mean:g} and top1_agreement {limits.top1_agreement:g}",
            f"Allow more or give more memory; the best that fits was {best['profile']} with {best['kld_mean']:.5f}",
        )
    return best["profile"], rows


def fitting(model: Any, context: int | None, memory: int) -> dict[str, int]:
    """Levels that state a tolerance and whose cache of one session of `context` tokens (None: the model's longest) takes at
    most `memory` bytes, running states included; each with its planned bytes. Raises EvaluationError if there is none."""
    described = read(model.config.to_dict())
    tokens = context or described.max_context
    if tokens is None:
        raise InvalidConfig("this config names no longest context", "Give --context")
    size = {}
    for name in gated():
        setting = Setting(load(name).spec, tokens, dtype_bytes=model.dtype.itemsize, device=model.device.type)
        try:
            planned = plan(described, setting)
        except UnsupportedHeadDim:
            continue
        size[name] = planned["folded_bytes"] + planned["state_bytes"]
    small = {n: b for n, b in size.items() if b <= memory}
    if not small:
        raise EvaluationError(
            f"no profile holds {tokens} tokens in {memory} bytes",
            f"Give {min(size.values())} bytes or a shorter context",
        )
    return small


def gated() -> list[str]:
    """Levels that state a tolerance."""
    return [n for n in levels() if load(n).tolerance is not None]


def _row(model: Any, windows: list[list[int]], name: str, limits: Tolerance, progress: Progress) -> dict[str, Any]:
    result = evaluate(model, windows, load(name).spec, progress)
    kept = {k: result[k] for k in ("kld_mean", "kld_se", "top1_agreement", "bits_per_value", "cache_bytes")}
    return {"profile": name, **kept, "passed": not failures(result, limits)}


def _by_bits(names: Iterable[str]) -> list[str]:
    """By nominal bits of keys and values together; of equal ones the lower rank first."""
    return sorted(names, key=lambda n: load(n).spec.key.bits + load(n).spec.value.bits)


def as_toml(name: str, limits: Tolerance, row: dict[str, Any], where: str, purpose: str) -> str:
    """A profile of one's own that builds on level `name`, with the measurement it rests on in a comment."""
    return (
        f"# Measured on {where}: KLD {row['kld_mean']:.5f} +- {row['kld_se']:.5f} nats, the same top token at "
        f"{100 * row['top1_agreement']:.1f} %, {row['bits_per_value']:.3f} bits per value.\n"
        f'base = "{name}"\n'
        f'purpose = "{purpose}"\n\n'
        f"[tolerance]\nkld_mean = {limits.kld_mean!r}\ntop1_agreement = {limits.top1_agreement!r}\n"
    )
