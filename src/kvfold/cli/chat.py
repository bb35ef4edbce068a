"""The verb that talks: a conversation in the terminal, kept under a name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvfold.cli import common
from kvfold.errors import InvalidConfig, KvfoldError, RequestCancelled

if TYPE_CHECKING:
    from rich.console import Console

    from kvfold.serving.model import Model
    from kvfold.serving.talk import Conversation

HISTORY = ".history"  # in the folder of sessions, whose names cannot begin with a dot


class Shell:
    """Runs lines: commands that begin with a slash, and what is to be said. generation: fields of Generation."""

    def __init__(self, model: Model, talk: Conversation, console: Console, generation: dict[str, Any]) -> None:
        self.model, self.talk, self.console, self.generation = model, talk, console, generation
        # Name -> (argument, help, work).
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/save": ("[NAME]", "write this conversation to the disk, or a copy of it under NAME", self._save),
            "/load": ("NAME", "go on with another conversation", self._load),
            "/fork": ("NAME", "go on in a copy; this one stays as it is", self._fork),
            "/new": ("[NAME]", "begin another conversation", self._new),
            "/sessions": ("", "conversations there are", lambda _: self._sessions()),
            "/memory": ("", "what is kept takes, folded and at 16 bits", lambda _: self._memory()),
            "/help": ("", "this list", lambda _: self._help()),
            "/quit": ("", "leave; everything is saved", lambda _: None),
        }

    def run(self, lines: Iterator[str]) -> None:
        """Until /quit or the end of `lines`. A mistake is told, and the next line is read."""
        for line in lines:
            if line.split()[:1] == ["/quit"]:
                return
            try:
                self._one(line.strip())
            except KvfoldError as error:
                self.console.print(f"[red]{error.message}.[/] {error.cure}.", highlight=False)

    def _one(self, line: str) -> None:
        if not line:
            return
        if not line.startswith("/"):
            self._say(line)
            return
        command, _, argument = line.partition(" ")
        if command not in self.commands:
            raise InvalidConfig(f"there is no command {command}", "See /help")
        wanted, _, work = self.commands[command]
        if wanted == "NAME" and not argument.strip():
            raise InvalidConfig(f"{command} needs a name", f"Write {command} {wanted}")
        work(argument.strip())

    def _say(self, text: str) -> None:
        """Ctrl-C ends the answer alone."""
        stream = self.talk.complete(text, stream=True, **self.generation)
        try:
            for piece in stream:
                self.console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            self.console.print()
        except KeyboardInterrupt:
            stream.cancel()
            with suppress(RequestCancelled):
                stream.read()  # until it has ended: what was answered is kept
            self.console.print("\n[dim]stopped[/]")
            return
        used = stream.answer.usage
        self._tell(f"{used.completion_tokens} tokens; {used.cached_tokens} of {used.prompt_tokens} were there already")

    def _tell(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False, markup=False)

    def _save(self, name: str) -> None:
        talk = self.talk.fork(name) if name else self.talk
        row = talk.save()
        self._tell(f"saved {talk.name}: {row['tokens']:,} tokens, {common.as_size(row['bytes'])}")

    def _load(self, name: str) -> None:
        talk = self.model.session(name)
        row = talk.info()
        self.talk = talk
        for m in talk.messages:
            self.console.print(f"{m['role']}: {m['content']}", markup=False, highlight=False, soft_wrap=True)
        self._tell(f"{name}: {row['tokens']:,} tokens")

    def _fork(self, name: str) -> None:
        self.talk = self.talk.fork(name)
        self._tell(f"this is {name} now")

    def _new(self, name: str) -> None:
        self.talk = self.model.session(name or fresh_name(self.model), self.talk.system)
        self._tell(f"this is {self.talk.name} now")

    def _sessions(self) -> None:
        rows = self.model.shelf.rows()
        if not rows:
            self._tell("there are none yet")
            return
        shown = [
            {
                "name": r["name"],
                "tokens": r["tokens"],
                "size": common.as_size(r["bytes"]),
                "against 16 bits": f"{r['ratio']:.1f}",
                "saved": "yes" if r["on_disk"] else "no",
            }
            for r in rows
        ]
        common.show_table(shown)

    def _memory(self) -> None:
        report = self.model.shelf.store.report()
        folded, reference = report["memory_bytes"], report["memory_reference_bytes"]
        common.show_fields(
            {
                "folded": common.as_size(folded),
                "at 16 bits": common.as_size(reference),
                "ratio": round(reference / folded, 2) if folded else 0.0,
                **{k: common.as_size(v) for k, v in report["memory_bytes_by_kind"].items()},
                "allowed": common.as_size(report["memory_limit_bytes"]),
                "conversations in memory": report["sessions_in_memory"],
            },
            "memory of all conversations",
        )

    def _help(self) -> None:
        for name, (argument, text, _) in self.commands.items():
            self.console.print(f"  {f'{name} {argument}':<16} {text}", highlight=False, markup=False)


def fresh_name(model: Model) -> str:
    """`chat-` and the time, and a number if that is taken."""
    taken = {r["name"] for r in model.shelf.rows()}
    base = f"chat-{datetime.now():%Y%m%d-%H%M}"
    return next(x for n in range(1, len(taken) + 2) if (x := base if n == 1 else f"{base}-{n}") not in taken)


def lines(history: Path | None, commands: list[str]) -> Iterator[str]:
    """What is typed, with completion of commands and a history that lasts; or the lines of standard input, if it is no
    terminal. Ctrl-C empties the line, Ctrl-D ends it."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if history is not None:
        history.parent.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if history is None else FileHistory(str(history)),
        completer=WordCompleter(commands, sentence=True),
    )
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def chat(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")] = "demo",
    session: Annotated[str | None, typer.Option(help="Conversation to go on with, or to begin.")] = None,
    system: Annotated[str | None, typer.Option(help="Message that begins a new conversation.")] = None,
    profile: common.ProfileName = "balanced",
    memory: Annotated[str, typer.Option(help="What all conversations may take in memory.")] = "4GiB",
    disk: Annotated[Path | None, typer.Option(help="Folder of sessions; default as of kvfold sessions.")] = None,
    no_disk: Annotated[bool, typer.Option("--no-disk", help="Write nothing.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    dtype: Annotated[str, typer.Option(help="Model dtype.")] = "auto",
    revision: common.Revision = None,
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    trust_remote_code: common.Trust = False,
    chat_template: common.Template = None,
    offline: common.Offline = False,
) -> None:
    """Talk to a model; conversations are kept and go on where they ended."""
    from rich.console import Console

    from kvfold.loading import Options
    from kvfold.serving.model import load
    from kvfold.sessions.disk import default_folder

    console = Console()
    folder = None if no_disk else disk or default_folder()
    options = Options(revision, dtype, device, device_map, trust_remote_code, chat_template, offline)
    generation = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with load(model, profile, memory=memory, disk=folder, options=options) as loaded:
        shell = Shell(loaded, loaded.session(session or fresh_name(loaded), system), console, generation)
        if shell.talk.exists:
            shell.run(iter([f"/load {shell.talk.name}"]))
        console.print(f"[bold]{shell.talk.name}[/] with {loaded.source}, profile {profile}. /help lists commands.")
        shell.run(lines(None if folder is None else folder / HISTORY, list(shell.commands)))
        name, kept = shell.talk.name, shell.talk.exists and folder is not None
    if kept:
        console.print(f"Go on with: kvfold chat {model} --session {name}", highlight=False, markup=False)


def add_to(app: typer.Typer) -> None:
    app.command()(chat)
