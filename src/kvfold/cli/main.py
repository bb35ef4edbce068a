"""Entry point: runs a verb, turns errors into sentences (or one JSON object under --json), and sets the exit code."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import typer

from kvfold.cli import bench, chat, evaluate, generate, inspect, plan, serve, sessions, tune
from kvfold.errors import KvfoldError, MissingExtra

app = typer.Typer(
    name="kvfold",
    help="Fold an LLM's KV cache to a fifth of its size, decode from the packed pages, and measure what changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (evaluate, generate, chat, inspect, plan, serve, sessions, tune, bench):
    module.add_to(app)

# The base of all usage errors. Newer typers bring their own copy of click, so it is reached through a class they export.
UsageErrors: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
# Optional packages that a verb may import, and the extra that brings each.
EXTRA_OF = dict.fromkeys(("torch", "transformers", "accelerate", "safetensors", "xxhash"), "transformers")
EXTRA_OF |= {"matplotlib": "plot", "prompt_toolkit": "chat"}
EXIT_FAILED = 1
EXIT_USAGE = 2


def _fail(kind: str, message: str, cure: str, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"error": {"kind": kind, "message": message, "cure": cure}}) + "\n")
    else:
        sys.stderr.write(f"kvfold: {message}.{' ' + cure + '.' if cure else ''}\n")


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; returns never: exits 0 only if the thing was done."""
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    code: Any = 0
    try:
        code = typer.main.get_command(app).main(given, prog_name="kvfold", standalone_mode=False)
    except typer.Abort:
        _fail("Interrupted", "interrupted", "", as_json)
        code = 130
    except KvfoldError as error:
        _fail(type(error).__name__, error.message, error.cure, as_json)
        code = EXIT_FAILED
    except MemoryError:
        _fail("OutOfMemory", "there is not enough memory", "Use a shorter context or a smaller profile", as_json)
        code = EXIT_FAILED
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = None
        code = EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - the process edge: report, show the trace, exit non-zero
        if isinstance(error, UsageErrors):
            _fail("UsageError", str(error.format_message()).rstrip("."), "See kvfold --help", as_json)
            sys.exit(EXIT_USAGE)
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRA_OF:
            missing = MissingExtra.of("this command", error.name, EXTRA_OF[error.name])
            _fail("MissingExtra", missing.message, missing.cure, as_json)
            sys.exit(EXIT_FAILED)
        if isinstance(error, OSError) and error.filename is not None:
            _fail(type(error).__name__, f"{error.filename}: {error.strerror}", "Check the path and the disk", as_json)
            sys.exit(EXIT_FAILED)
        traceback.print_exc(file=sys.stderr)
        _fail(
            type(error).__name__, str(error) or type(error).__name__, "This is a bug; please report the trace", as_json
        )
        code = EXIT_FAILED
    sys.exit(code if isinstance(code, int) else 0)
