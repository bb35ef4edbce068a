"""The verb that finds a profile for one model and one text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli import common
from kvfold.cli.evaluate import read_text
from kvfold.errors import InvalidConfig
from kvfold.loading import Options, load
from kvfold.profiles import Profile, Tolerance
from kvfold.profiles import load as load_profile


def tune(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")],
    max_kld: Annotated[
        float | None, typer.Option(help="Mean KL divergence allowed, in nats; default .005, or any with --memory.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Share of positions whose most likely token must stay; default .95.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Instead: the closest profile whose cache takes no more than this, such as 1GiB.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="With --memory: tokens the cache holds; default: the model's longest.")
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option(help="Instead: bits per channel in the model's own bases, as many as this level has: extreme."),
    ] = None,
    by_layer: Annotated[
        str | None,
        typer.Option(help="Instead: bits per layer, as many as this level has, where your model needs them: compact."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on; documents separated by NUL. Default: shipped docs.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the profile to this file, for --profile FILE.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows.")] = 4,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    basis_windows: Annotated[
        int, typer.Option(min=1, help="With --tuned or --by-layer: more windows, which bits are measured on.")
    ] = 12,
    dtype: Annotated[str, typer.Option(help="Model dtype.")] = "float32",
    revision: common.Revision = None,
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    trust_remote_code: common.Trust = False,
    offline: common.Offline = False,
    json: common.Json = False,
) -> None:
    """The smallest profile that loses no more than is allowed, or the closest that fits, on your model and your text; or
    with --by-layer or --tuned a level's own bits, shared out among the layers or the channels of your model."""
    common.check_output(output, "--output", (".toml",))
    limits = Tolerance(0.005 if max_kld is None else max_kld, 0.95 if min_top1 is None else min_top1)
    room = _room(memory, context)
    level = _level((tuned, by_layer), output, (max_kld, min_top1, memory))
    content = read_text(text)
    loaded = load(model, Options(revision, dtype, device, device_map, trust_remote_code, None, offline))
    from kvfold.evaluation import gate
    from kvfold.evaluation.text import windows as cut

    parts = cut(content, loaded.tokenizer, windows, window_tokens, 0)
    where = f"{windows} windows of {window_tokens} tokens of {text.name if text else 'the shipped docs'}"
    if level is not None and output is not None:
        seen = cut(content, loaded.tokenizer, basis_windows, window_tokens, windows)
        kind = "channel" if tuned is not None else "layer"
        _tuned(
            loaded.model, level, kind, output, (seen, parts), f"{where}, bits by {kind} on {basis_windows} others", json
        )
        return
    with common.progress("scoring") as report:
        if room is None:
            name, rows = gate.smallest(loaded.model, parts, limits, report)
            promised, why = limits, "The smallest profile that keeps the tolerance below."
        else:
            given = limits if (max_kld, min_top1) != (None, None) else None
            name, rows = gate.closest(loaded.model, parts, gate.fitting(loaded.model, *room), given, report)
            promised, why = given or gate.stated(load_profile(name)), f"The closest profile within {memory}."
    if output is not None:
        row = next(r for r in rows if r["profile"] == name)
        output.write_text(gate.as_toml(name, promised, row, where, why), encoding="utf-8")
    if json:
        common.show_json({"profile": name, "rows": rows})
        return
    common.show_table(rows, f"{model}: {name}. {why}")


def _room(memory: str | None, context: str | None) -> tuple[int | None, int] | None:
    """(tokens or the model's longest, bytes) to fit into, if any."""
    if memory is None:
        if context is not None:
            raise InvalidConfig("--context is for --memory", "Give both")
        return None
    tokens = common.one_number(context, "--context") if context is not None else None
    return tokens, common.size(memory, "--memory")


def _level(names: tuple[str | None, ...], output: Path | None, others: tuple[object, ...]) -> Profile | None:
    """The level whose bits are to be shared out, if any."""
    given = [n for n in names if n is not None]
    if not given:
        return None
    if len(given) > 1 or any(x is not None for x in others):
        raise InvalidConfig(
            "--tuned and --by-layer each keep a level's bits and ask for nothing else",
            "Give one of them, and no limits",
        )
    if output is None:
        raise InvalidConfig("a tuned profile is a file", "Give --output NAME.toml")
    return load_profile(given[0])


def _tuned(
    model: Any,
    level: Profile,
    kind: str,
    output: Path,
    parts: tuple[list[list[int]], list[list[int]]],
    where: str,
    json: bool,
) -> None:
    """kind: what bits are shared out among, `channel` or `layer`. parts: windows to measure on, and to choose on."""
    from kvfold.tuning.choice import as_toml, by_channel, by_layer, check, choose
    from kvfold.tuning.statistics import collect

    forms = {"channel": by_channel, "layer": by_layer}[kind]
    check(level.spec)
    seen, judged = parts
    with common.progress("following gradients") as report:
        moments = collect(model, seen, level.spec, progress=report)
    with common.progress("scoring") as report:
        choice = choose(model, forms(level.spec, moments), judged, report)
    bases = output.with_suffix(".safetensors")
    if choice.data:
        bases.write_bytes(choice.data)
    output.write_text(as_toml(level, choice, bases.name, where), encoding="utf-8")
    if json:
        common.show_json({"profile": level.name, "form": choice.form, "rows": choice.rows})
        return
    common.show_table(choice.rows, f"{level.name}: {choice.form}")


def add_to(app: typer.Typer) -> None:
    app.command()(tune)
