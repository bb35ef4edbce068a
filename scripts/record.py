"""Run a kvfold command with --json and append its figures, with where they come from, to bench/results/<verb>.csv
(an eval with baselines to baselines.csv, our own figures first; one with legs to legs.csv, a row per leg).

python scripts/record.py eval demo --profile balanced
python scripts/record.py needle demo --contexts 2k,8k --trials 5
python scripts/record.py --from figures.json needle demo --contexts 2k,8k --trials 5 --device cuda

The last one runs nothing: the file is what the command printed on another machine, with `machine`, `torch` and others of the
first columns beside the figures where they differ from those here.
"""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    """Model name and number of cores, as Linux tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x{len(names)}"


def provenance(arguments: list[str]) -> dict[str, str]:
    def git(*a: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True, check=True).stdout.strip()

    dirty = "+changes" if git("status", "--porcelain", "--", "src", "csrc") else ""
    versions = {p: metadata.version(p) for p in ("numpy", "torch", "transformers")}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD") + dirty,
        "machine": processor(),
        "python": platform.python_version(),
        **versions,
        "command": "kvfold " + " ".join(Path(a).name if a.startswith("/") else a for a in arguments),
    }


def flat(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per entry of `rows`, or one in all and one per baseline, without lists."""
    rows = result.get("rows") or [result]
    if "legs" in result:
        rows = [{"leg": name, **leg} for name, leg in result["legs"].items()]
    elif "baselines" in result:
        rows = [{"baseline": "", **result}, *result["baselines"]]
    return [{k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in rows]


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file; it gets the columns of both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    fields = list(dict.fromkeys(name for row in [*old[:1], *rows] for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, fields)
    writer.writeheader()
    writer.writerows(old + rows)
    path.write_text(out.getvalue(), encoding="utf-8", newline="")  # only now: a row that does not fit costs no other


def measured(arguments: list[str]) -> dict[str, Any]:
    """What the command prints here."""
    done = subprocess.run(
        [sys.executable, "-m", "kvfold", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main(arguments: list[str]) -> None:
    elsewhere = None
    if arguments[0] == "--from":
        elsewhere, arguments = Path(arguments[1]), arguments[2:]
    result = measured(arguments) if elsewhere is None else json.loads(elsewhere.read_text(encoding="utf-8"))
    where = provenance(arguments)
    where |= {k: str(result.pop(k)) for k in where if elsewhere is not None and k in result}
    rows = [{**where, **row} for row in flat(result)]
    beside = [n for option, n in (("--legs", "legs"), ("--baseline", "baselines")) if option in arguments]
    name = (beside or arguments)[0]
    append(ROOT / "bench" / "results" / f"{name}.csv", rows)
    for row in rows:
        print(json.dumps({k: v for k, v in row.items() if k not in where}))


if __name__ == "__main__":
    main(sys.argv[1:])
