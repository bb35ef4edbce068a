"""Verbs for sessions on the disk: ls, info, verify, rm, export, import; and what they cost: restore, crowd."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli import common
from kvfold.errors import SessionError, WrongModel
from kvfold.loading import Options, load

Folder = Annotated[
    Path | None,
    typer.Option(
        "--disk", help="Folder of sessions; default: KVFOLD_SESSIONS, or kvfold/sessions in the user's data folder."
    ),
]
Name = Annotated[str, typer.Argument(help="A session's name, or the path of its folder.")]

app = typer.Typer(help="Look at saved sessions, verify, remove, and move them.", no_args_is_help=True)


def _find(name: str, disk: Path | None) -> Path:
    """The folder of a session given by name, or by a path."""
    from kvfold.sessions.disk import Disk, default_folder

    return Path(name) if "/" in name else Disk(disk or default_folder()).folder(name)


@app.command()
def ls(disk: Folder = None, json: common.Json = False) -> None:
    """The sessions there are."""
    from kvfold.sessions.archive import info
    from kvfold.sessions.disk import Disk, default_folder

    shelf = Disk(disk or default_folder())
    rows: list[dict[str, Any]] = []
    for name in shelf.names():
        try:
            x = info(shelf.folder(name))
            when = datetime.fromtimestamp(x["saved"]).astimezone().isoformat(timespec="seconds")
            rows.append(
                {
                    "name": name,
                    "tokens": x["tokens"],
                    "disk_bytes": x["disk_bytes"],
                    "profile": x["profile"],
                    "saved": when,
                }
            )
        except SessionError as error:
            rows.append({"name": name, "tokens": 0, "disk_bytes": 0, "profile": type(error).__name__, "saved": ""})
    if json:
        common.show_json({"disk": str(shelf.root), "sessions": rows})
    elif rows:
        common.show_table(rows, str(shelf.root))
    else:
        typer.echo(f"no sessions in {shelf.root}")


@app.command()
def info(name: Name, disk: Folder = None, json: common.Json = False) -> None:
    """What a session holds and what it was made with."""
    from kvfold.sessions.archive import info as read

    data = read(_find(name, disk))
    if json:
        common.show_json(data)
    else:
        common.show_fields(data, name)


@app.command()
def verify(
    name: Name,
    model: Annotated[str | None, typer.Option(help="Compare with this model, too.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Compare every byte of the model's weights.")] = False,
    dtype: Annotated[str, typer.Option(help="Model dtype.")] = "auto",
    disk: Folder = None,
    json: common.Json = False,
) -> None:
    """Check every byte against its checksum. What is damaged is named, and how much of the session is whole."""
    from kvfold.sessions.archive import verify as check

    folder = _find(name, disk)
    data = check(folder)
    if model is not None:
        data |= _compare(folder, model, dtype, full)
    elif full:
        raise WrongModel("there is no model to compare with", "Give it: --model MODEL --full")
    if json:
        common.show_json(data)
    else:
        common.show_fields(data, name)


def _compare(folder: Path, source: str, dtype: str, full: bool) -> dict[str, Any]:
    from kvfold.sessions import fingerprint
    from kvfold.sessions.manifest import Manifest

    made = Manifest.read(folder).model
    loaded = load(source, Options(dtype=dtype))
    now = fingerprint.fingerprint(loaded.model, loaded.tokenizer)
    if full:
        now |= fingerprint.full(loaded.model)
        if "full" not in made:
            raise WrongModel(
                "the session's writer did not read all of its model's weights",
                "Verify without --full: samples are compared",
            )
    fingerprint.check(made, now)
    return {"model": "the same", "compared": sorted(made.keys() & now.keys())}


@app.command()
def rm(name: Name, disk: Folder = None, json: common.Json = False) -> None:
    """Remove a session."""
    from kvfold.sessions.archive import remove

    folder = _find(name, disk)
    remove(folder)
    if json:
        common.show_json({"removed": name})
    else:
        typer.echo(f"removed {folder}")


@app.command()
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    disk: Folder = None,
    json: common.Json = False,
) -> None:
    """Make one file of a session."""
    from kvfold.sessions.archive import export as pack

    pack(_find(name, disk), file)
    if json:
        common.show_json({"file": str(file), "bytes": file.stat().st_size})
    else:
        typer.echo(f"wrote {file}, {file.stat().st_size:,} bytes")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file that export wrote.")],
    name: Name,
    disk: Folder = None,
    json: common.Json = False,
) -> None:
    """Make a session of an exported file, after verifying it."""
    from kvfold.sessions.archive import import_ as unpack

    folder = _find(name, disk)
    unpack(file, folder)
    if json:
        common.show_json({"name": name, "folder": str(folder)})
    else:
        typer.echo(f"imported to {folder}")


@app.command()
def llama_fold(
    state: Annotated[Path, typer.Argument(help="A slot file of llama-server, or a saved state of one sequence.")],
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    model: Annotated[str, typer.Option(help="The model that llama.cpp ran: GGUF file, folder, or hub id.")],
    profile: common.ProfileName = "balanced",
    json: common.Json = False,
) -> None:
    """Fold what llama.cpp saved of a sequence into a file of about a fifth of its size."""
    from kvfold.adapters.llama_cpp.folding import fold, heads_of
    from kvfold.loading import describe
    from kvfold.profiles import load as profile_of

    fold(state.read_bytes(), heads_of(describe(model, Options()).model), profile_of(profile).spec, file)
    _wrote(file, state.stat().st_size, json)


@app.command()
def llama_unfold(
    file: Annotated[Path, typer.Argument(help="A file that llama-fold wrote.")],
    state: Annotated[Path, typer.Argument(help="The file to write, for llama.cpp to restore.")],
    json: common.Json = False,
) -> None:
    """Make the state that llama.cpp restores of a folded file."""
    from kvfold.adapters.llama_cpp.folding import unfold

    state.write_bytes(unfold(file))
    _wrote(state, file.stat().st_size, json)


def _wrote(file: Path, before: int, json: bool) -> None:
    now = file.stat().st_size
    if json:
        common.show_json({"file": str(file), "bytes": now, "from_bytes": before})
    else:
        typer.echo(f"wrote {file}, {now:,} bytes (from {before:,})")


@app.command()
def restore(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")] = "demo",
    context: Annotated[str, typer.Option(help="Tokens of the session, such as 100k.")] = "100k",
    profile: common.ProfileName = "balanced",
    dtype: Annotated[str, typer.Option(help="Model dtype.")] = "auto",
    json: common.Json = False,
) -> None:
    """Measure: restoring a session against computing it again, and its files against its memory."""
    from kvfold.sessions.measure import restore as measure

    result = measure(load(model, Options(dtype=dtype)), common.one_number(context, "--context"), profile)
    if json:
        common.show_json(result)
    else:
        common.show_fields(result, f"{model}, profile {profile}")


@app.command()
def crowd(
    sessions: Annotated[int, typer.Option(min=1)] = 4,
    context: Annotated[str, typer.Option(help="Tokens of each session.")] = "256k",
    memory: Annotated[str, typer.Option(help="What their caches may take together.")] = "8GiB",
    profile: common.ProfileName = "balanced",
    json: common.Json = False,
) -> None:
    """Measure: long sessions of a model shaped like a 4B hybrid under one memory budget, on synthetic pages."""
    from kvfold.sessions.measure import crowd as measure

    result = measure(sessions, common.one_number(context, "--context"), memory, profile)
    if json:
        common.show_json(result)
    else:
        common.show_fields(result, f"{sessions} sessions of {context}, profile {profile}")


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="sessions")
