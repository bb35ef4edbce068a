"""Write what was measured of profiles into their files, from bench/results: [[evidence]], [[needles]], [[sizes]], [[speeds]].

Of every command, model and context the newest rows count. python scripts/record.py eval demo --profile balanced;
python scripts/evidence.py
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from kvfold.bench.cuda_decode import CODECS
from kvfold.profiles import load

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "src" / "kvfold" / "profiles"
DEMO = "recall-llama-12m"
SIZED = 131072  # tokens
# What the CUDA engine's rows call codecs and widths.
LETTERS = {codec: letter for letter, codec in CODECS.items()}
Row = dict[str, str]


def read(name: str) -> list[Row]:
    with (ROOT / "bench" / "results" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def model_of(command: str) -> str:
    return Path(command.split()[2].replace("demo", DEMO)).stem


def block(kind: str, values: dict[str, str]) -> str:
    """values: TOML, by key."""
    return f"\n[[{kind}]]\n" + "".join(f"{k} = {v}\n" for k, v in values.items())


def evidence(name: str) -> Iterable[str]:
    rows = {r["command"]: r for r in read("eval")}
    for command, r in rows.items():
        if command.split()[3:] == ["--profile", name]:
            yield block(
                "evidence",
                {
                    "model": f'"{model_of(command)}"',
                    "kld_mean": f"{float(r['kld_mean']):.5f}",
                    "kld_se": f"{float(r['kld_se']):.5f}",
                    "top1_agreement": f"{float(r['top1_agreement']):.4f}",
                    "bits_per_value": f"{float(r['bits_per_value']):.3f}",
                    "command": f'"{command}"',
                },
            )


def needles(name: str) -> Iterable[str]:
    """All kinds and depths of a model and context together."""
    cells: dict[tuple[str, int], list[Row]] = {}
    for r in read("needle"):
        if r["profile"] == name:
            known = cells.setdefault((model_of(r["command"]), int(r["context"])), [])
            if known and known[-1]["command"] != r["command"]:
                known.clear()
            known.append(r)
    for (model, context), rows in cells.items():
        trials = sum(int(r["trials"]) for r in rows)
        mean = {
            n: sum(int(r["trials"]) * float(r[n]) for r in rows) / trials
            for n in ("recall_reference", "recall", "answer_nll_reference", "answer_nll")
        }
        figures = {n: f"{x:.4f}" for n, x in mean.items()}
        whole = {"model": f'"{model}"', "context": str(context), "trials": str(trials)}
        yield block("needles", whole | figures | {"command": f'"{rows[-1]["command"]}"'})


def sizes(name: str) -> Iterable[str]:
    rows = {(r["command"], r["profile"]): r for r in read("plan") if r["context"] == str(SIZED)}
    for (command, profile), r in rows.items():
        if profile == name and r["sessions"] == "1":
            figures = {"context": r["context"], "ratio": f"{float(r['ratio']):.2f}", "command": f'"{command}"'}
            yield block("sizes", {"model": f'"{model_of(command)}"'} | figures)


def speeds(name: str) -> Iterable[str]:
    """Decode attention of 32 query heads over 8 of 128 numbers, against the fastest over 16 bits in the same run. Of one commit's
    kernels: rows that name none are older than that column."""
    key, value = load(name).spec.key, load(name).spec.value
    if not {(s.codec, s.bits) for s in (key, value)} <= set(LETTERS):
        return
    wanted = ("equal", "32", "8", "128", LETTERS[key.codec, key.bits], LETTERS[value.codec, value.bits], "16", "kvfold")
    fields = ("lengths", "heads", "kv_heads", "dim", "key", "value", "batch", "contender")
    rows = (r for r in read("gpu_decode") if tuple(r[f] for f in fields) == wanted and r["commit"])
    for r in {(r["device"], r["tokens"]): r for r in rows}.values():
        figures = {"ms": f"{float(r['median_us']) / 1000:.3f}", "x_16_bit": f"{float(r['ratio']):.2f}"}
        what = {"device": f'"{r["device"]}"', "tokens": r["tokens"], "batch": r["batch"]}
        yield block("speeds", what | figures | {"command": '"python bench/gpu/run.py --parts decode"'})
    # Ours and the others' ms, of the newest run that has both.
    runs: dict[tuple[str, str], tuple[Row, list[float]]] = {}
    for r in read("cpu"):
        bits = float(r["key_bits"]), float(r["value_bits"])
        shape = r["op"], r["query_heads"], r["kv_heads"], r["head_dim"], r["threads"]
        if bits != (key.bits, value.bits) or shape != ("decode", "32", "8", "128", "1"):
            continue
        if r["contender"] == "kvfold":  # the first of every run
            ours, others = r, []
        elif r["contender"].startswith("torch-") and {ours["codec"], key.codec, value.codec} == {key.codec}:
            others.append(float(r["median_ms"]))
            runs[f"{r['machine'].split(',')[0]}, level {r['level']}", r["context"]] = ours, others
    for (machine, context), (r, others) in runs.items():
        ms = float(r["median_ms"])
        what = {"device": f'"{machine}"', "tokens": context, "batch": "1"}
        figures = {"ms": f"{ms:.3f}", "x_16_bit": f"{min(others) / ms:.2f}"}
        bits = f"--codec {key.codec} --key-bits {key.bits:g} --value-bits {value.bits:g}"
        yield block("speeds", what | figures | {"command": f'"kvfold bench decode {bits}"'})


def blocks(name: str, own: bool) -> str:
    """All that was measured of a profile; of one that builds on another (not `own`) nothing but its own evidence."""
    return "".join(b for part in ((evidence, needles, sizes, speeds) if own else (evidence,)) for b in part(name))


def main() -> None:
    for path in sorted(PROFILES.glob("*.toml")):
        text = path.read_text(encoding="utf-8").split("\n[[")[0].rstrip() + "\n"
        path.write_text(text + blocks(path.stem, "base =" not in text), encoding="utf-8")


if __name__ == "__main__":
    main()
