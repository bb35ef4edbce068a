"""python -m kvfold.bench decode --context 32768 --csv bench/results/cpu.csv: run one case and record it."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

from kvfold.bench.harness import record
from kvfold.bench.run import OPS, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvfold.bench")
    parser.add_argument("op", choices=OPS)
    for name, parameter in inspect.signature(run).parameters.items():
        if name not in ("op", "against"):
            kind = float if name.endswith("_bits") else int if isinstance(parameter.default, int) else str
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=parameter.default)
    parser.add_argument("--against", help="names separated by commas")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    options = vars(parser.parse_args())
    path, against = options.pop("csv"), options.pop("against")
    if against is not None:
        options["against"] = tuple(name for name in against.split(",") if name)
    result = run(**options)
    print(json.dumps(result))
    if path is not None:
        record(result, path)


main()
