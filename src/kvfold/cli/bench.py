"""The verb that times."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvfold.cli import common


def bench(
    op: Annotated[str, typer.Argument(help="decode, prefill or fold.")],
    device: Annotated[str, typer.Option(help="cpu; the CUDA engine is timed by bench/gpu/run.py.")] = "cpu",
    context: Annotated[str, typer.Option(help="Folded tokens, such as 32k.")] = "32k",
    query_heads: Annotated[int, typer.Option(min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=8)] = 128,
    key_bits: Annotated[float, typer.Option()] = 3,
    value_bits: Annotated[float, typer.Option()] = 3,
    codec: Annotated[str, typer.Option(help="mse, uniform, trellis or computed.")] = "mse",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    clock: Annotated[str, typer.Option(help="cpu: on-CPU time of the process; wall.")] = "cpu",
    against: Annotated[str | None, typer.Option(help="Contenders, comma-separated.")] = None,
    level: Annotated[str | None, typer.Option(help="Force a SIMD level; see `kvfold doctor`.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 9,
    json: common.Json = False,
) -> None:
    """Time attention over folded pages, or folding, against other ways to do the same, interleaved in one process."""
    from kvfold.bench.run import run

    chosen: dict[str, Any] = {"against": tuple(x for x in against.split(",") if x)} if against is not None else {}
    result: dict[str, Any] = run(
        op,
        device=device,
        context=common.one_number(context, "--context"),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        key_bits=key_bits,
        value_bits=value_bits,
        codec=codec,
        batch=batch,
        threads=threads,
        clock=clock,
        level=level,
        rounds=rounds,
        **chosen,
    )
    if json:
        common.show_json(result)
        return
    rows = result.pop("rows")
    common.show_fields(result, f"bench {op}")
    common.show_table(rows)


def add_to(app: typer.Typer) -> None:
    app.command()(bench)
