"""The verb that finds a profile for one model and one text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli import common
from kvfold.cli.evaluate import read_text
from kvfold.errors import InvalidConfig
from kvfold.loading import Options, load
from kvfold.profiles import Tolerance


def tune(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")],
    max_kld: Annotated[float, typer.Option(help="Mean KL divergence allowed, in nats.")] = 0.005,
    min_top1: Annotated[float, typer.Option(help="Share of positions whose most likely token must stay.")] = 0.95,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on; documents separated by NUL. Default: shipped docs.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the profile to this file, for --profile FILE.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows.")] = 4,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    dtype: Annotated[str, typer.Option(help="Model dtype.")] = "float32",
    revision: common.Revision = None,
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    trust_remote_code: common.Trust = False,
    offline: common.Offline = False,
    json: common.Json = False,
) -> None:
    """The smallest profile that loses no more than is allowed, on your model and your text."""
    if output is not None and output.suffix != ".toml":
        raise InvalidConfig(f"{output} does not end with .toml", "Name the file something.toml")
    limits = Tolerance(max_kld, min_top1)
    content = read_text(text)
    loaded = load(model, Options(revision, dtype, device, device_map, trust_remote_code, None, offline))
    from kvfold.evaluation.gate import as_toml, smallest
    from kvfold.evaluation.text import windows as cut

    with common.progress("scoring") as report:
        name, rows = smallest(loaded.model, cut(content, loaded.tokenizer, windows, window_tokens, 0), limits, report)
    if output is not None:
        where = f"{windows} windows of {window_tokens} tokens of {text.name if text else 'the shipped docs'}"
        output.write_text(as_toml(name, limits, rows[-1], where), encoding="utf-8")
    if json:
        common.show_json({"profile": name, "rows": rows})
        return
    common.show_table(rows, f"{model}: {name} is the smallest profile that passes")


def add_to(app: typer.Typer) -> None:
    app.command()(tune)
