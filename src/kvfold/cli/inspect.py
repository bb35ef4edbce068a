"""Verbs that tell: profiles, doctor."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Any

import typer

from kvfold.cli import common
from kvfold.profiles import MEASURED, load, names


def profiles(
    evidence: Annotated[
        bool, typer.Option("--evidence", help="What was measured of each, and by which command.")
    ] = False,
    json: common.Json = False,
) -> None:
    """The named choices there are, and what each is for."""
    if evidence:
        _show_evidence(json)
        return
    rows: list[dict[str, Any]] = []
    for name in names():
        p = load(name)
        s = p.spec
        rows.append(
            {
                "name": name,
                "key": f"{s.key.codec} {s.key.bits:g}",
                "value": f"{s.value.codec} {s.value.bits:g}",
                "window": s.window,
                "sinks": s.sinks,
                "centre": s.centre,
                "graded": s.graded,
                "purpose": p.purpose,
            }
        )
    if json:
        common.show_json({"profiles": rows})
        return
    common.show_table(rows, "profiles")


def _show_evidence(json: bool) -> None:
    rows = {
        kind: [{"profile": name, **row} for name in names() for row in getattr(load(name), kind)] for kind in MEASURED
    }
    if json:
        common.show_json({"rows": rows.pop("evidence"), **rows})
        return
    common.show_table(rows.pop("evidence"), "divergence from the 16-bit cache")
    for kind, found in rows.items():
        common.show_table(found, kind)


def doctor(
    model: Annotated[str | None, typer.Argument(help="A model to look at, too.")] = None,
    profile: Annotated[str, typer.Option(help="The profile its layers are to be folded with.")] = "balanced",
    json: common.Json = False,
) -> None:
    """What this machine and installation can do, and why not the rest. Of a model: which layers fold, and what runs them."""
    from kvfold.diagnosis import engines, machine, model_layers

    data: dict[str, Any] = {"machine": machine(), "packages": _versions(), "engines": engines()}
    if model is not None:
        data["model"] = model_layers(model, profile)
    if json:
        common.show_json(data)
        return
    common.show_fields(data["machine"], "machine")
    common.show_fields(data["packages"], "packages")
    common.show_table(data["engines"], "engines")
    if model is not None:
        common.show_table(_grouped(data["model"]), f"layers of {model}, profile {profile}")


def _grouped(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers that differ in their number only as one row."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in layers:
        groups.setdefault(tuple(x for k, x in row.items() if k != "layer"), []).append(row["layer"])
    names = [k for k in layers[0] if k != "layer"]
    rows = []
    for same, numbers in groups.items():
        first = ", ".join(map(str, numbers[:4])) + (f" … {numbers[-1]}" if len(numbers) > 4 else "")
        rows.append({"layers": first, "count": len(numbers), **dict(zip(names, same, strict=True))})
    return rows


def _versions() -> dict[str, str]:
    out = {}
    for name in (
        "kvfold",
        "numpy",
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "gguf",
        "matplotlib",
        "triton",
    ):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def add_to(app: typer.Typer) -> None:
    app.command()(profiles)
    app.command()(doctor)
