"""What several verbs share: options, number lists, output, progress."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.errors import InvalidConfig

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
ProfileName = Annotated[str, typer.Option("--profile", help="A profile's name; see `kvfold profiles`.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Device = Annotated[str | None, typer.Option(help="Device to run on, such as cpu or cuda.")]
DeviceMap = Annotated[str | None, typer.Option(help="Spread the model over devices, such as auto.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")]
Template = Annotated[str | None, typer.Option(help="File with a chat template.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the network.")]


def numbers(values: list[str], what: str, whole: bool) -> list[Any]:
    """`2k,32k` or `1 2 3` to numbers; k and M are binary thousands and millions."""
    out: list[Any] = []
    for token in re.split(r"[,\s]+", " ".join(values).strip()):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", token)
        if not match:
            raise InvalidConfig(f"{token!r} is not a number for {what}", f"Write {what} as 1,2,3 or 2k,32k")
        value = float(match[1]) * {"": 1, "k": 1024, "m": 1 << 20}[match[2].lower()]
        if whole and value != int(value):
            raise InvalidConfig(f"{token!r} is not a whole number", f"Write {what} as whole numbers")
        out.append(int(value) if whole or value == int(value) else value)
    return out


PICTURES = (".png", ".svg", ".pdf")
SIZE_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
SIZE_UNITS |= {f"{u}i": 1024**i for i, u in enumerate("kmgt", 1)}


def size(text: str, what: str) -> int:
    """`24GiB`, `24GB`, `512M` to bytes; units without an i are decimal."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not match or match[2] not in SIZE_UNITS:
        raise InvalidConfig(f"{text!r} is not a size for {what}", f"Write {what} as 24GiB, 16GB or 512MiB")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def one_number(text: str, what: str) -> int:
    """`32k` to a whole number, of which there may be only one."""
    found = numbers([text], what, whole=True)
    if len(found) != 1:
        raise InvalidConfig(f"{what} is {len(found)} numbers", f"Write {what} as one, such as 32k")
    return int(found[0])


def check_output(path: Path | None, option: str, suffixes: tuple[str, ...] = ()) -> None:
    """Raise InvalidConfig if a file cannot be written there, before the work that fills it is done."""
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise InvalidConfig(f"{path} is no name for {option}", f"Let it end with one of: {', '.join(suffixes)}")
    there = path if path.exists() else path.parent
    if path.is_dir() or not there.exists() or not os.access(there, os.W_OK):
        raise InvalidConfig(f"{path} cannot be written", f"Give {option} a file in a folder that you may write to")


def as_size(nbytes: int) -> str:
    """Bytes for people, in binary units."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.2f} {unit}" if unit != "B" else f"{nbytes} B"


def show_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, allow_nan=False) + "\n")
    sys.stdout.flush()


def show_table(rows: list[dict[str, Any]], title: str = "") -> None:
    """Rows as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_cell(v) for v in row.values()))
    Console().print(table)


def show_fields(data: dict[str, Any], title: str) -> None:
    show_table([{"what": k.replace("_", " "), "value": _cell(v)} for k, v in data.items()], title)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr that appears with the first report."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
