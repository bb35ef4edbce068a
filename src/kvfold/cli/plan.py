"""The verb that says what a context will cost before it is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli import common
from kvfold.errors import InvalidConfig, UnsupportedHeadDim
from kvfold.loading import Described, Options, check_device, describe
from kvfold.planner.fit import fitted
from kvfold.planner.model import Model
from kvfold.planner.plan import Setting
from kvfold.profiles import levels, load

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOST_BITS = 64  # of a weight
BAR = 40  # characters of the longest bar


def plan(
    model: Annotated[str, typer.Argument(help="Folder, config.json, GGUF file, hub id, or demo.")],
    context: Annotated[str, typer.Option(help="Tokens per session, such as 128k; default: the model's longest.")] = "",
    sessions: Annotated[int, typer.Option(min=1, help="Sessions at once, each with a cache of its own.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Rows of each cache, read together.")] = 1,
    profile: common.ProfileName = "balanced",
    memory: Annotated[
        str | None, typer.Option(help="Memory to plan for, such as 24GiB; default: this machine's.")
    ] = None,
    fits: Annotated[str | None, typer.Option(help="Answer whether it fits into this much, and what binds.")] = None,
    weights_bits: Annotated[float | None, typer.Option(help="Bits per weight instead of those of the files.")] = None,
    states: Annotated[
        str | None, typer.Option(help="Recurrent states: exact, or int8; default: the profile's.")
    ] = None,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one prefill call.")] = 2048,
    dtype: Annotated[str | None, typer.Option(help="Model dtype instead of the config's.")] = None,
    device: common.Device = None,
    backend: Annotated[str, typer.Option(help="Engine whose pages are planned; see `kvfold doctor`.")] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Every profile, with a chart.")] = False,
    plot: Annotated[Path | None, typer.Option(help="With --compare: also write the chart as a picture.")] = None,
    revision: common.Revision = None,
    trust_remote_code: common.Trust = False,
    offline: common.Offline = False,
    json: common.Json = False,
) -> None:
    """Bytes of a context by layer and kind, from the config alone: what fits, and what binds."""
    _check(dtype, weights_bits, device, plot)
    described = describe(model, Options(revision, trust_remote_code=trust_remote_code, offline=offline))
    budget = _budget(memory, fits)
    tokens = _context(context, described.model)
    known = described.weights is not None
    if not known:
        typer.echo(f"kvfold: the weights of {model} are not known and not in the total", err=True)

    def of(name: str) -> dict[str, Any]:
        setting = Setting(
            spec=load(name).spec.with_overrides(states=states),
            context=tokens,
            sessions=sessions,
            weights_bytes=_weights(described, weights_bits, DTYPES.get(dtype or "")),
            dtype_bytes=DTYPES.get(dtype or ""),
            backend=backend,
            device=device or "cpu",
            prefill_tokens=prefill_tokens,
            rows=batch,
        )
        head = {"model": described.model.name, "profile": name, "weights_known": known}
        return {**head, **fitted(described.model, setting, budget)}

    if compare or plot is not None:
        rows = _compared(of)
        if plot is not None:
            from kvfold.evaluation.plots import bars

            bars(rows, str(plot))
        _show_comparison(rows, json)
    else:
        _show(of(profile), json, asked=fits is not None)


def _compared(of: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """The plan of every level that has codes for the model's head size, without its layers."""
    rows = []
    for name in levels():
        try:
            rows.append({k: x for k, x in of(name).items() if k != "layers"})
        except UnsupportedHeadDim as error:
            typer.echo(f"kvfold: without {name}: {error.message}", err=True)
    return rows


def _check(dtype: str | None, weights_bits: float | None, device: str | None, plot: Path | None) -> None:
    """Raise for options that cannot be, before anything is read."""
    if dtype is not None and dtype not in DTYPES:
        raise InvalidConfig(f"unknown dtype {dtype!r}", f"Use one of: {', '.join(DTYPES)}")
    if weights_bits is not None and not 0 < weights_bits <= MOST_BITS:
        raise InvalidConfig(
            f"there are no {weights_bits:g} bits per weight", "Give --weights-bits a number such as 4.5"
        )
    if device not in (None, "cpu"):
        check_device(str(device))
    common.check_output(plot, "--plot", common.PICTURES)


def _budget(memory: str | None, fits: str | None) -> int:
    if memory is not None and fits is not None and common.size(memory, "--memory") != common.size(fits, "--fits"):
        raise InvalidConfig("--memory and --fits name different sizes", "Give one of them")
    if (given := fits or memory) is not None:
        return common.size(given, "--fits" if fits else "--memory")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _context(context: str, model: Model) -> int:
    if context:
        return common.one_number(context, "--context")
    if model.max_context is None:
        raise InvalidConfig("this config names no longest context", "Give --context")
    return model.max_context


def _weights(described: Described, bits: float | None, dtype_bytes: int | None) -> int:
    """Bytes of the weights as they will lie in memory."""
    weights = described.weights
    if bits is None and dtype_bytes is None:
        return weights.bytes if weights else 0
    if weights is None or weights.parameters is None:
        why = "are packed codes" if weights else "are not at hand"
        raise InvalidConfig(f"the weights of {described.source} {why}", "Leave --weights-bits and --dtype out")
    return int(weights.parameters * (bits / 8 if bits is not None else dtype_bytes or 0))


def _show(result: dict[str, Any], json: bool, asked: bool) -> None:
    if json:
        common.show_json(result)
        return
    layers = result.pop("layers")
    kinds: dict[tuple[str, bool], dict[str, Any]] = {}
    for row in layers:
        group = kinds.setdefault((row["kind"], row["folds"]), {"kind": row["kind"], "folds": row["folds"], "layers": 0})
        group["layers"] += 1
        for k in ("bytes", "reference_bytes", "state_bytes"):
            group[k] = group.get(k, 0) + row[k]
    common.show_table([_readable(g) for g in kinds.values()], f"{result['model']}, profile {result['profile']}")
    common.show_fields(_readable(result), f"{result['context']:,} tokens, {result['sessions']} sessions")
    if asked:
        verdict = "yes" if result["fits"] else "no"
        over = f", {common.as_size(-result['headroom_bytes'])} too much" if not result["fits"] else ""
        typer.echo(f"{verdict}: the largest term is {result['binding']}{over}")


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    return {k.removesuffix("_bytes"): common.as_size(v) if k.endswith("bytes") else v for k, v in row.items()}


def _show_comparison(rows: list[dict[str, Any]], json: bool) -> None:
    if json:
        common.show_json({"rows": rows})
        return
    longest = max(r["folded_bytes"] for r in rows)
    shown = []
    for r in rows:
        line = {
            k: r[k] for k in ("profile", "folded_bytes", "ratio", "total_bytes", "fits", "max_context", "max_sessions")
        }
        shown.append({**_readable(line), "chart": "█" * max(1, round(BAR * r["folded_bytes"] / longest))})
    common.show_table(shown, f"{rows[0]['model']}, {rows[0]['context']:,} tokens, {rows[0]['sessions']} sessions")


def add_to(app: typer.Typer) -> None:
    app.command()(plan)
