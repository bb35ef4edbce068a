"""`kvfold bench`: one operation, one shape, several contenders."""

from __future__ import annotations

from kvfold.bench import on_cpu
from kvfold.bench.case import Case
from kvfold.bench.harness import as_dict, race
from kvfold.errors import InvalidConfig

OPS = ("decode", "prefill", "fold")


def run(
    op: str,
    device: str = "cpu",
    context: int = 32768,
    query_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    key_bits: float = 3,
    value_bits: float = 3,
    codec: str = "mse",
    batch: int = 1,
    threads: int = 1,
    clock: str = "cpu",
    against: tuple[str, ...] = ("read-floor", "torch-sdpa", "torch-sdpa-folded"),
    level: str | None = None,
    new_tokens: int = 4096,
    rounds: int = 9,
) -> dict[str, object]:
    """Time kvfold and the contenders `against` it in one process.

    decode: one new token over `context` folded ones. prefill: `new_tokens` over `context` folded ones. fold: `context`
    tokens. Returns the case, the level and `rows` (see bench.harness.Row). Raises InvalidConfig for an unknown
    operation, device, clock or contender.
    """
    if op not in OPS:
        raise InvalidConfig(f"unknown operation {op!r}", f"Use one of: {', '.join(OPS)}")
    if device != "cpu":
        raise InvalidConfig(f"no contenders on device {device!r}", "Use 'cpu'; bench/gpu/run.py times the CUDA engine")
    case = Case(op, context, query_heads, kv_heads, head_dim, key_bits, value_bits, codec, batch, threads, new_tokens)
    field = on_cpu.Field(case, level)
    contenders = [field.contender(name) for name in ("kvfold", *(n for n in against if n != "kvfold"))]
    rows = race(contenders, rounds, clock, field.finish)
    shape = {k: getattr(case, k) for k in Case.__dataclass_fields__}
    return {"device": device, "level": field.level, "clock": clock, **shape, "rows": [as_dict(r) for r in rows]}
