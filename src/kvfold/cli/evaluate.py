"""Verbs that measure: demo, distortion, eval, needle, memory."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvfold.cli import common
from kvfold.config import CacheSpec
from kvfold.errors import EvaluationError, InvalidConfig
from kvfold.loading import Loaded, Options, load
from kvfold.profiles import load as load_profile

if TYPE_CHECKING:
    from kvfold.evaluation.contenders import Contender
    from kvfold.evaluation.divergence import Scores


def demo(
    profile: common.ProfileName = "balanced",
    context: Annotated[str, typer.Option(help="Tokens of the document.")] = "32k",
    json: common.Json = False,
) -> None:
    """Needle recall, memory and speed of the shipped model, 16-bit against folded."""
    from kvfold.evaluation.demo import run

    with common.progress("reading a long document twice") as report:
        result = run(profile, common.one_number(context, "--context"), report)
    if json:
        common.show_json(result)
        return
    common.show_fields(result, f"recall-llama-12m, {result['context']:,} tokens, profile {profile}")


def distortion(
    dim: Annotated[int, typer.Option(help="head_dim of the vectors.")] = 128,
    bits: Annotated[str | None, typer.Option(help="Widths, such as 1,2,3,4; not for fixed-rate codecs.")] = None,
    codec: Annotated[str, typer.Option(help="mse, uniform, trellis, computed, prod, qjl, polar or split.")] = "mse",
    scale: Annotated[str, typer.Option(help="norm, unbiased, least-squares or match.")] = "norm",
    search: Annotated[int, typer.Option(help="Grids tried per vector: 1 or 3.")] = 1,
    json: common.Json = False,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Squared error and inner-product error of a codec on random vectors, beside the theory's bounds."""
    from kvfold.evaluation.distortion import measure

    widths = common.numbers([bits, *(more or [])], "--bits", whole=False) if bits is not None else []
    rows = measure(dim, widths, codec, scale=scale, search=search)
    if json:
        common.show_json({"dim": dim, "rows": rows})
        return
    common.show_table(rows, f"distortion at head_dim {dim}")


def _spec(profile: str, **overrides: Any) -> CacheSpec:
    return load_profile(profile).spec.with_overrides(**overrides)


def eval_(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to score; documents separated by NUL. Default: shipped docs.")
    ] = None,
    profile: common.ProfileName = "balanced",
    windows: Annotated[int, typer.Option(min=1, help="How many windows.")] = 4,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    skip: Annotated[int, typer.Option(min=0, help="Windows to skip first.")] = 0,
    key_codec: Annotated[str | None, typer.Option()] = None,
    key_bits: Annotated[float | None, typer.Option()] = None,
    value_codec: Annotated[str | None, typer.Option()] = None,
    value_bits: Annotated[float | None, typer.Option()] = None,
    window: Annotated[int | None, typer.Option(help="Newest tokens kept exact.")] = None,
    sinks: Annotated[int | None, typer.Option(help="First tokens kept exact.")] = None,
    centre: Annotated[bool | None, typer.Option("--centre/--no-centre", help="Subtract the mean key.")] = None,
    scale: Annotated[str | None, typer.Option(help="norm, unbiased, least-squares or match, for both sides.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the rotations.")] = None,
    states: Annotated[str | None, typer.Option(help="Recurrent states of hybrids: exact, or int8.")] = None,
    graded: Annotated[
        bool | None,
        typer.Option("--graded/--no-graded", help="More bits for the last layer, fewer for the first ones."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Other caches to measure too, such as hf-quanto-4,kivi-2,rotated-q4,turboquant-3; or profiles."
        ),
    ] = None,
    legs: Annotated[
        str | None,
        typer.Option(help="Also generation, prefix, multiturn, copy, layers (some), on the first window."),
    ] = None,
    leg_tokens: Annotated[int, typer.Option(min=4, help="Greedy tokens of each leg.")] = 2048,
    report: Annotated[Path | None, typer.Option(help="Write report.html to this folder, self-contained.")] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Fail if the profile's stated tolerance is not kept.")] = False,
    dtype: Annotated[str, typer.Option(help="Model dtype; quantized weights keep theirs.")] = "float32",
    revision: common.Revision = None,
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    trust_remote_code: common.Trust = False,
    chat_template: common.Template = None,
    offline: common.Offline = False,
    json: common.Json = False,
) -> None:
    """KL divergence, top-1 agreement and perplexity through a folded cache against the model's own cache."""
    from kvfold.adapters.hf_weights import weights_bytes
    from kvfold.evaluation.divergence import figures
    from kvfold.evaluation.gate import failures, stated
    from kvfold.evaluation.legs import named, run
    from kvfold.evaluation.report import prepare

    spec = _spec(
        profile,
        key_codec=key_codec,
        key_bits=key_bits,
        value_codec=value_codec,
        value_bits=value_bits,
        window=window,
        sinks=sinks,
        centre=centre,
        scale=scale,
        seed=seed,
        states=states,
        graded=graded,
    )
    limits = stated(load_profile(profile)) if gate else None
    asked = named(legs.split(",")) if legs else []
    if report is not None:
        prepare(report)
    content = read_text(text)
    loaded = load(model, Options(revision, dtype, device, device_map, trust_remote_code, chat_template, offline))
    from kvfold.evaluation.text import windows as cut

    parts = cut(content, loaded.tokenizer, windows, window_tokens, skip)
    scores = _scored(loaded.model, parts, spec, profile, baseline.split(",") if baseline else [])
    weights = weights_bytes(loaded.model)
    rows = {name: figures(s) | {"weights_bytes": weights} for name, s in scores.items()}
    found = {}
    if asked:
        with common.progress("legs") as shown:
            found = run(loaded.model, parts[0], spec, asked, leg_tokens, shown)
    if report is not None:
        protocol: dict[str, Any] = {
            "text": text.name if text else "shipped docs",
            "sha256": sha256(content.encode()).hexdigest(),
        }
        protocol |= {"windows": windows, "window tokens": window_tokens, "windows skipped": skip}
        _report(report, loaded, spec, (scores, rows, parts, found), protocol)
    result, *others = [row if not i else {"baseline": n, **row} for i, (n, row) in enumerate(rows.items())]
    broken = failures(result, limits) if limits is not None else []
    if limits is not None:
        result |= {"gate_passed": not broken, "gate_failures": broken}
    if asked:
        result |= {"legs": found}
    if baseline:
        result |= {"baselines": others}
    if json:
        common.show_json(result)
    else:
        _show(result, f"{model}, profile {profile}, {windows} windows of {window_tokens}")
    if broken:
        raise typer.Exit(1)


# Of a baseline on a terminal; --json has all.
BRIEF = ("baseline", "kld_mean", "top1_agreement", "perplexity_change", "bits_per_value")


def _show(result: dict[str, Any], title: str) -> None:
    others, legs = result.pop("baselines", []), result.pop("legs", {})
    common.show_fields(result, title)
    for name, leg in legs.items():
        by_layer = leg.pop("layers", [])
        common.show_fields(leg, f"leg {name}")
        if by_layer:
            common.show_table(by_layer, "layers")
    if others:
        common.show_table([{k: r[k] for k in BRIEF} for r in others], "baselines")


def _scored(
    model: Any, parts: list[list[int]], spec: CacheSpec, profile: str, baselines: list[str]
) -> dict[str, Scores]:
    """The folded cache under its profile's name, then each baseline under its own."""
    from kvfold.evaluation.contenders import Folded, baseline
    from kvfold.evaluation.divergence import score

    contenders: list[Contender] = [Folded(profile, model.config, spec)]
    contenders += [baseline(name.strip(), model.config, spec.seed) for name in baselines]
    with common.progress("scoring") as report:
        return dict(zip((c.name for c in contenders), score(model, parts, contenders, report), strict=True))


def _report(
    folder: Path,
    loaded: Loaded,
    spec: CacheSpec,
    measured: tuple[Any, Any, list[list[int]], Any],
    protocol: dict[str, Any],
) -> None:
    from kvfold.evaluation import report
    from kvfold.sessions.fingerprint import fingerprint

    scores, rows, parts, legs = measured
    digests = fingerprint(loaded.model, loaded.tokenizer)
    hashes: dict[str, Any] = {k: digests[k] for k in ("full", "weights", "tensors", "tokenizer") if k in digests}
    facts = report.provenance(loaded.model, spec, {"source": loaded.source, **hashes}, protocol)
    facts = {f"Leg {name}": leg for name, leg in legs.items()} | facts
    title = f"{loaded.source} through {next(iter(scores))}"
    path = report.write(report.Report(title, scores, rows, parts, loaded.tokenizer, facts), folder)
    sys.stderr.write(f"wrote {path}\n")


def read_text(path: Path | None) -> str:
    if path is None:
        from kvfold.evaluation.text import haystack

        return haystack()
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise EvaluationError(f"no file {path}", "Give --text a UTF-8 text file") from error
    except (UnicodeDecodeError, OSError) as error:
        raise EvaluationError(
            f"{path} cannot be read as UTF-8 text ({error})", "Give --text a UTF-8 text file"
        ) from error


def needle(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens, such as 2k,8k,32k.")] = "2k,8k",
    profile: Annotated[str, typer.Option(help="A profile's name, or several: balanced,compact.")] = "balanced",
    kinds: Annotated[str | None, typer.Option(help="Needle kinds, comma-separated; default all four.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Answers per context, depth and kind.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of documents and needles.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write heat maps to this file.")] = None,
    dtype: Annotated[str, typer.Option(help="Model dtype; quantized weights keep theirs.")] = "float32",
    revision: common.Revision = None,
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    trust_remote_code: common.Trust = False,
    chat_template: common.Template = None,
    offline: common.Offline = False,
    json: common.Json = False,
) -> None:
    """Facts hidden in long texts: how many come back through the folded cache, and through the 16-bit one."""
    lengths = common.numbers([contexts, *(more or [])], "--contexts", whole=True)
    if min(lengths) < 1:
        raise InvalidConfig("a context has no tokens", "Use 2048 tokens or more")
    common.check_output(plot, "--plot", common.PICTURES)
    specs = {name.strip(): load_profile(name.strip()).spec for name in profile.split(",")}
    loaded = load(model, Options(revision, dtype, device, device_map, trust_remote_code, chat_template, offline))
    from kvfold.evaluation.needle import grid
    from kvfold.evaluation.plots import heat_maps

    chosen = kinds.split(",") if kinds else None
    with common.progress("reading documents") as report:
        rows = grid(loaded.model, loaded.tokenizer, lengths, specs, chosen, trials, seed, report)
    if plot is not None:
        heat_maps(rows, str(plot))
    if len(specs) == 1:  # said once, beside the rows
        rows = [{k: v for k, v in row.items() if k != "profile"} for row in rows]
    if json:
        common.show_json({"model": model, "profile": profile, "rows": rows})
        return
    common.show_table(rows, f"needles, {model}, profile {profile}")


def memory(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")],
    context: Annotated[str, typer.Option(help="Tokens of the prompt.")] = "32k",
    profile: common.ProfileName = "balanced",
    json: common.Json = False,
) -> None:
    """Peak memory of prefill and 64 steps, beyond model and activations: no cache, 16-bit and folded, a process each."""
    from kvfold.evaluation.memory import measure

    result = measure(model, common.one_number(context, "--context"), load_profile(profile).name)
    if json:
        common.show_json(result)
        return
    common.show_fields(result, f"{model}, profile {profile}")


def add_to(app: typer.Typer) -> None:
    app.command()(demo)
    app.command()(distortion)
    app.command("eval")(eval_)
    app.command()(needle)
    app.command()(memory)
