"""Write the [[evidence]] of profiles from the last row of each command in bench/results/eval.csv that names one.

python scripts/record.py eval demo --profile balanced; python scripts/evidence.py
"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "src" / "kvfold" / "profiles"
DEMO = "recall-llama-12m"


def block(row: dict[str, str]) -> str:
    model = row["command"].split()[2].replace("demo", DEMO)
    return (
        f'\n[[evidence]]\nmodel = "{model}"\nkld_mean = {float(row["kld_mean"]):.5f}\nkld_se = {float(row["kld_se"]):.5f}\n'
        f"top1_agreement = {float(row['top1_agreement']):.4f}\nbits_per_value = {float(row['bits_per_value']):.3f}\n"
        f'command = "{row["command"]}"\n'
    )


def main() -> None:
    with (ROOT / "bench" / "results" / "eval.csv").open(encoding="utf-8") as file:
        rows = {r["command"]: r for r in csv.DictReader(file)}
    for path in sorted(PROFILES.glob("*.toml")):
        found = [r for c, r in rows.items() if c.split()[3:] == ["--profile", path.stem]]
        text = path.read_text(encoding="utf-8").split("\n[[evidence]]")[0].rstrip() + "\n"
        path.write_text(text + "".join(map(block, found)), encoding="utf-8")


main()
