"""The verb that serves a model, and the one that measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli import common
from kvfold.errors import InvalidConfig, MissingExtra
from kvfold.loading import Options, load

MIB = 1 << 20


def serve(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")],
    profile: common.ProfileName = "balanced",
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="KVFOLD_API_KEY", help="Key that clients must send.")] = None,
    model_name: Annotated[str | None, typer.Option(help="The model's id for clients.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Requests read and answered together.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 64,
    max_context: Annotated[str | None, typer.Option(help="Tokens of prompt and answer, such as 32k.")] = None,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request.")] = 16,
    call_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt read in one call.")] = None,
    memory: Annotated[str, typer.Option(help="What the caches of all sessions may take.")] = "4GiB",
    disk: Annotated[Path | None, typer.Option(help="Folder of sessions; default as of kvfold sessions.")] = None,
    no_disk: Annotated[bool, typer.Option("--no-disk", help="Write nothing; sessions end with the server.")] = False,
    spare_disk: Annotated[str, typer.Option(help="What sessions without a name may take of the disk.")] = "16GiB",
    grace: Annotated[float, typer.Option(min=0, help="Seconds that answers get to end at shutdown.")] = 10.0,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another host name to answer to.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A site whose pages may call.")] = None,
    dtype: Annotated[str, typer.Option(help="Model dtype.")] = "auto",
    revision: common.Revision = None,
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    trust_remote_code: common.Trust = False,
    chat_template: common.Template = None,
    offline: common.Offline = False,
) -> None:
    """Serve a model to OpenAI's clients."""
    try:
        from kvfold.server.guard import LOOPBACK, Rules
        from kvfold.server.launch import Address, Server
        from kvfold.server.metrics import Metrics
        from kvfold.server.service import Service
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic"):
            raise
        raise MissingExtra.of("kvfold serve", error.name, "server") from error
    from kvfold.serving.model import Model
    from kvfold.serving.scheduler import Limits
    from kvfold.serving.shelf import Keep
    from kvfold.sessions.disk import default_folder

    local = host in LOOPBACK
    if not local and api_key is None:
        raise InvalidConfig(f"whoever reaches {host} could use the model", "Give --api-key, or listen on 127.0.0.1")
    hosts = (*LOOPBACK, *(allow_host or ())) if local else None
    rules = Rules(hosts, tuple(allow_origin or ()), api_key, max_body * MIB)
    loaded = load(model, Options(revision, dtype, device, device_map, trust_remote_code, chat_template, offline))
    metrics = Metrics()
    context = common.numbers([max_context], "--max-context", whole=True)[0] if max_context else None
    limits = Limits(max_rows, max_waiting)
    keep = Keep(memory, None if no_disk else disk or default_folder(), spare_disk)
    service = Service(
        Model(loaded, profile, limits=limits, meter=metrics, max_context=context, call_tokens=call_tokens, keep=keep),
        model_name or _name(model),
        metrics,
    )
    Server(service, rules, Address(host, port), grace).run()


def _name(source: str) -> str:
    """What clients call a model: a hub id as it is, of a path the last part alone."""
    if source == "demo":
        from kvfold.loading import DEMO

        return DEMO
    path = Path(source)
    return path.stem if path.suffix == ".gguf" else path.name if path.exists() else source


def load_test(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or demo.")] = "demo",
    profile: common.ProfileName = "balanced",
    minutes: Annotated[float, typer.Option(min=0.05, help="How long the clients go on.")] = 10.0,
    clients: Annotated[int, typer.Option(min=1)] = 16,
    document: Annotated[str, typer.Option(help="Tokens of the document that is asked about, such as 32k.")] = "32k",
    fresh: Annotated[int, typer.Option(min=1, max=10, help="Questions asked again with all of it read anew.")] = 10,
    memory: Annotated[str, typer.Option(help="What the server's caches may take.")] = "256MiB",
    json: common.Json = False,
) -> None:
    """Measure a server of its own: many streams at once, eight sessions batched, one document asked about ten times."""
    from kvfold.server.measure import run

    tokens = common.numbers([document], "--document", whole=True)[0]
    result = run(model, profile, minutes, clients, tokens, memory, fresh)
    if json:
        common.show_json(result)
    else:
        common.show_fields(result, f"{clients} clients, {minutes:g} minutes")


def add_to(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(load_test)
