"""Write the tables of README.md and docs/ from bench/results/*.csv; --check fails if they differ from what is there."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
NEEDLE_PROFILES = ("balanced", "compact", "extreme")
SWIFT_PROFILES = ("swift-3", "swift-2.5")  # beside them where a row is a profile
OWN = ("tuned-", "graded-", "by-layer-")  # how names of profiles begin that differ from these in bits alone
LONGEST_GRID = 32768  # tokens; beyond, one kind and profile
SCALAR = "turbo-3"  # the profile of scalar codes that levels are compared with
BEST_LEVELS = ("amx", "avx512-vnni", "avx2")  # of the machines in cpu.csv, one table each
Row = dict[str, str]


def read(name: str) -> list[Row]:
    path = RESULTS / f"{name}.csv"
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in body])


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each command, in order of first appearance."""
    return list({r["command"]: r for r in rows}.values())


def option(row: Row, name: str, default: str) -> str:
    found = re.search(rf"--{name} (\S+)", row["command"])
    return found[1] if found else default


def model_name(row: Row) -> str:
    return row["command"].split()[2].replace("demo", "recall-llama-12m").removeprefix("recall-").rsplit("-", 1)[0]


def baselines_table() -> str:
    """Fewest bits first, a column per model; the last row of each model and contender."""
    cells: dict[str, dict[str, Row]] = {}
    for r in read("baselines"):
        if option(r, "profile", "balanced") == SCALAR:
            continue
        name = r["baseline"] or f"kvfold {option(r, 'profile', 'balanced')}"
        cells.setdefault(name, {})[model_name(r)] = r
    body = []
    for name, rows in sorted(cells.items(), key=lambda c: float(c[1]["llama"]["bits_per_value"])):
        of = [rows[m] for m in ("llama", "biased", "hybrid")]
        bits = " / ".join(f"{float(r['bits_per_value']):.3f}" for r in of)
        kld = [f"{float(r['kld_mean']):.5f} ± {float(r['kld_se']):.5f}" for r in of]
        top = " / ".join(f"{100 * float(r['top1_agreement']):.1f}" for r in of)
        body.append([name, bits, *kld, top, f"{float(of[0]['exact_tokens_mean']):.0f}"])
    head = ["cache", "bits llama / biased / hybrid", "KLD llama", "biased", "hybrid"]
    return markdown([*head, "same top token, %", "exact tokens, mean"], body)


def trellis_table() -> str:
    """Levels beside the scalar profile of the same run, which is the first row of each command."""
    body = []
    runs: dict[str, list[Row]] = {}
    for r in read("baselines"):
        if option(r, "profile", "balanced") == SCALAR:
            known = runs.setdefault(model_name(r), [])
            if not r["baseline"]:
                known.clear()
            known.append(r)
    for model, rows in runs.items():
        for r in rows:
            share = float(r["kld_mean"]) / float(rows[0]["kld_mean"])
            body.append([model, r["baseline"] or SCALAR, f"{float(r['bits_per_value']):.3f}"])
            body[-1] += [f"{float(r['kld_mean']):.5f} ± {float(r['kld_se']):.5f}", f"{share:.2f}"]
    return markdown(["model", "profile", "bits", "KLD", f"of {SCALAR}'s"], body)


def computed_table() -> str:
    """Widths of keys and values, a column per model."""
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for r in latest(read("eval")):
        if option(r, "key-codec", "") == "computed":
            cells.setdefault((option(r, "key-bits", ""), option(r, "value-bits", "")), {})[model_name(r)] = r
    body = []
    for widths, rows in cells.items():
        of = [rows[m] for m in ("llama", "biased", "hybrid")]
        kld = [f"{float(r['kld_mean']):.5f} ± {float(r['kld_se']):.5f}" for r in of]
        top = " / ".join(f"{100 * float(r['top1_agreement']):.1f}" for r in of)
        body.append([", ".join(widths), f"{float(of[0]['bits_per_value']):.3f}", *kld, top])
    return markdown(["keys, values", "bits, llama", "KLD llama", "biased", "hybrid", "same top token, %"], body)


def legs_table() -> str:
    body = []
    for r in {(r["command"], r["leg"]): r for r in read("legs")}.values():
        first = f"after {int(r['first_divergence']):,}" if r["first_divergence"] else "none"
        body.append(
            [model_name(r), option(r, "profile", "balanced"), r["leg"], f"{int(r['tokens']):,}"]
            + [f"{float(r['kld_mean']):.5f}", f"{float(r['kld_max']):.3f}", f"{100 * float(r['top1_agreement']):.1f} %"]
            + [first, {"True": "yes", "False": "no"}.get(r["equal_to_fresh"], "-")]
            + [" / ".join(f"{100 * float(r[f]):.1f} %" for f in ("accuracy_reference", "accuracy") if r.get(f)) or "-"]
        )
    head = ["model", "profile", "leg", "tokens", "KLD", "largest", "same top token", "first other choice"]
    return markdown([*head, "equal to a fresh run", "copied, 16-bit / folded"], body)


def eval_table() -> str:
    body = []
    for r in latest(read("eval")):
        if option(r, "key-codec", ""):
            continue  # no profile's: a table of their own
        model = model_name(r)
        profile = "plain" if "--no-centre" in r["command"] else option(r, "profile", "balanced")
        if skip := option(r, "skip", ""):
            profile += f", {skip} windows on"
        if r["command"].endswith(" --graded"):
            profile += ", graded"
        if states := option(r, "states", ""):
            profile += f", states {states}"
        kld, change = float(r["kld_mean"]), 100 * float(r["perplexity_change"])
        body.append(
            [model, profile, f"{float(r['bits_per_value']):.3f}", f"{kld:.5f} ± {float(r['kld_se']):.5f}"]
            + [f"{100 * float(r['top1_agreement']):.1f} %", f"{change:+.2f} %"]
        )
    return markdown(["model", "profile", "bits", "KLD", "same top token", "perplexity"], body)


def tune_runs(how: str) -> dict[tuple[str, str], dict[str, Row]]:
    """By model and level, a row per form; the last run of each. how: `tuned` or `by-layer`."""
    runs: dict[tuple[str, str], dict[str, Row]] = {}
    for r in read("tune"):
        if level := option(r, how, ""):
            runs.setdefault((model_name(r), level), {})[r["form"]] = r
    return runs


def by_layer_table() -> str:
    body = []
    for (model, level), forms in tune_runs("by-layer").items():
        pair = (forms["plain"], forms["by layer"])
        bits = " / ".join(f"{float(r['bits_per_value']):.3f}" for r in pair)
        kld = [f"{float(r['kld_mean']):.5f} ± {float(r['kld_se']):.5f}" for r in pair]
        top = " / ".join(f"{100 * float(r['top1_agreement']):.1f}" for r in pair)
        body.append([model, level, bits, *kld, top])
    head = ["model", "level", "bits plain / by layer", "KLD plain", "by layer"]
    return markdown([*head, "same top token, %, plain / by layer"], body)


def tune_table() -> str:
    """A row per model and level, a column per form."""
    body = []
    for (model, level), forms in tune_runs("tuned").items():
        plain, both, values = (forms[f] for f in ("plain", "tuned", "tuned values"))
        bits = " / ".join(f"{float(r['bits_per_value']):.3f}" for r in (plain, both))
        kld = [f"{float(r['kld_mean']):.5f} ± {float(r['kld_se']):.5f}" for r in (plain, both, values)]
        top = " / ".join(f"{100 * float(r['top1_agreement']):.1f}" for r in (plain, both))
        body.append([model, level, bits, *kld, top])
    head = ["model", "level", "bits plain / tuned", "KLD plain", "tuned", "values alone"]
    return markdown([*head, "same top token, %, plain / tuned"], body)


def graded_table() -> str:
    """A row per model and level: as it is, and graded."""
    runs = {r["command"]: r for r in read("eval")}
    body = []
    for command, r in runs.items():
        if not command.endswith(" --graded"):
            continue
        pair = (runs[command.removesuffix(" --graded")], r)
        bits = " / ".join(f"{float(x['bits_per_value']):.3f}" for x in pair)
        kld = [f"{float(x['kld_mean']):.5f} ± {float(x['kld_se']):.5f}" for x in pair]
        top = " / ".join(f"{100 * float(x['top1_agreement']):.1f}" for x in pair)
        body.append([model_name(r), option(r, "profile", "balanced"), bits, *kld, top])
    head = ["model", "level", "bits as it is / graded", "KLD as it is", "graded"]
    return markdown([*head, "same top token, %, as it is / graded"], body)


def needle_cells() -> dict[tuple[int, str, str, str], list[Row]]:
    """Rows of all depths by context, model, kind and profile; of cells recorded again, the newest commit's."""
    cells: dict[tuple[int, str, str, str], list[Row]] = {}
    for r in read("needle"):
        profile = r.get("profile") or option(r, "profile", "balanced")
        known = cells.setdefault((int(r["context"]), model_name(r), r["kind"], profile), [])
        if known and known[-1]["commit"] != r["commit"]:
            known.clear()
        known.append(r)
    return cells


def needle_table(by_kind: bool) -> str:
    """A row per context and model, of each kind or of all together."""
    grid: dict[tuple[int, str, str], dict[str, list[Row]]] = {}
    for (context, model, kind, profile), rows in needle_cells().items():
        if profile in NEEDLE_PROFILES:
            grid.setdefault((context, model, kind if by_kind else ""), {}).setdefault(profile, []).extend(rows)
    body = []
    for (context, model, kind), of in sorted(grid.items()):
        recorded = [f"{r['date']} {r['commit']}" for rows in of.values() for r in rows]
        newest = next(rows for rows in of.values() if f"{rows[-1]['date']} {rows[-1]['commit']}" == max(recorded))
        each = [(newest, "_reference"), *((of.get(p, []), "") for p in NEEDLE_PROFILES)]
        found, lost = zip(*(_answers(rows, which) for rows, which in each), strict=True)
        body.append([f"{context:,}", model, *([kind] if by_kind else []), *found, *lost])
    names = ["16-bit", *NEEDLE_PROFILES]
    head = ["context", "model", *(["kind"] if by_kind else []), *(f"{n}, found" for n in names)]
    return markdown([*head, *(f"{n}, NLL" for n in names)], body)


def needle_loss_table() -> str:
    """A row per model and profile: every answer up to LONGEST_GRID tokens, and the loss with its standard error."""
    grid: dict[tuple[str, str], list[Row]] = {}
    for (context, model, _, profile), rows in needle_cells().items():
        if context <= LONGEST_GRID and (profile in NEEDLE_PROFILES + SWIFT_PROFILES or profile.startswith(OWN)):
            grid.setdefault((model, profile.removesuffix(".toml")), []).extend(rows)
    body = []
    for (model, profile), rows in sorted(grid.items()):
        lost = [float(r["answer_nll"]) - float(r["answer_nll_reference"]) for r in rows]
        error = stdev(lost) / len(lost) ** 0.5
        body.append([model, profile, _answers(rows, "_reference")[0], _answers(rows, "")[0]])
        body[-1] += [f"{mean(lost):+.4f} ± {error:.4f}"]
    return markdown(["model", "profile", "16-bit, found", "folded, found", "NLL lost"], body)


def _answers(rows: list[Row], which: str) -> tuple[str, str]:
    """(how many answers came back, their mean NLL); which: "" or "_reference"."""
    n = sum(int(r["trials"]) for r in rows)
    if not n:
        return "-", "-"
    hits = round(sum(int(r["trials"]) * float(r[f"recall{which}"]) for r in rows))
    return f"{hits} / {n}", f"{sum(int(r['trials']) * float(r[f'answer_nll{which}']) for r in rows) / n:.4f}"


def demo_table() -> str:
    body = []
    for r in latest(read("demo")):
        mib = [f"{int(r[f]) / 2**20:.1f} MiB" for f in ("reference_bytes", "cache_bytes")]
        speed = [float(r[f]) for f in ("decode_tokens_per_s_reference", "decode_tokens_per_s")]
        body.append(
            [f"{int(r['context']):,}", r["profile"], *mib, f"{float(r['ratio']):.2f}x", f"{speed[1] / speed[0]:.1f}x"]
            + [f"{100 * float(r['recall_reference']):.0f} % / {100 * float(r['recall']):.0f} %"]
        )
    return markdown(
        ["tokens", "profile", "16-bit", "folded", "smaller", "decode faster", "recall 16-bit / folded"], body
    )


def memory_table() -> str:
    body = []
    for r in latest(read("memory")):
        share = [f"{100 * float(r[f]):.0f} %" for f in ("stock_share", "folded_share", "over_cache_share")]
        model, planned = r["command"].split()[2], f"{100 * float(r['plan_error']):+.1f} %"
        body.append([model, f"{int(r['context']):,}", *share, planned])
    head = ["model", "prompt tokens", "stock cache (float32)", "folded", "of it beyond the folded bytes", "plan against peak"]
    return markdown(head, body)


def cpu_runs(best: str, beside: str = "read-floor", maker: str = "") -> list[dict[str, Row]]:
    """Interleaved runs of the newest commit in cpu.csv on machines whose best level is that one, rows by contender: only rows of
    one run are compared. beside: a contender that the commit must have rows of. maker: how names of the processors begin."""
    levels: dict[tuple[str, str], set[str]] = {}  # of a commit's rows on a machine, whose name does not tell what a host hides
    for r in read("cpu"):
        levels.setdefault((r["commit"], r["machine"]), set()).add(r["level"])
    hosts = {host for host, known in levels.items() if best == next((x for x in BEST_LEVELS if x in known), None)}
    rows = [r for r in read("cpu") if (r["commit"], r["machine"]) in hosts and r["machine"].startswith(maker)]
    newest = [r["commit"] for r in rows if r["contender"] == beside][-1]
    runs: list[dict[str, Row]] = []
    for r in rows:
        if r["commit"] == newest:
            if r["contender"] == "kvfold":  # the first of every run
                runs.append({})
            runs[-1][r["contender"]] = r
    return runs


def share(row: Row) -> str:
    return f"{100 * float(row['floor_fraction']):.0f} %" if row["floor_fraction"] else ""


def bench_table() -> str:
    """Decode at the AMX level, one thread: a row per context and width, a column per contender."""
    body = []
    for run in cpu_runs("amx"):
        r = run["kvfold"]
        what = (r["op"], r["query_heads"], r["head_dim"], r["threads"], r["level"])
        if what == ("decode", "32", "128", "1", "amx") and r["codec"] != "trellis" and "torch-sdpa" in run:
            ratios = [f"{float(run[c]['ratio']):.1f}x" for c in ("torch-sdpa", "torch-sdpa-folded")]
            bits = f"{float(r['key_bits']):g}"
            body.append((int(r["context"]), bits, f"{float(r['median_ms']):.2f} ms", *ratios, share(r)))
    head = ["context", "bits", "kvfold", "x torch", "x torch, group as queries", "of the read floor"]
    return markdown(head, [[f"{context:,}", *rest] for context, *rest in sorted(body)])


def cpu_table(best: str, maker: str = "") -> str:
    """Every run on machines whose best level is that one, in their order."""
    body = []
    for run in cpu_runs(best, maker=maker):
        r = run["kvfold"]
        case = f"{r['op']} {int(r['context']) // 1024}k"
        if r["op"] == "prefill":
            case = f"prefill, {int(r['new_tokens']) // 1024}k new tokens on {int(r['context']) // 1024}k"
        for name, usual, text in (("query_heads", "32", "query heads"), ("threads", "1", "threads, wall clock")):
            case += f", {r[name]} {text}" if r[name] != usual else ""
        case += f", head_dim {r['head_dim']}" if r["head_dim"] != "128" else ""
        bits = ", ".join(dict.fromkeys(f"{float(r[side]):g}" for side in ("key_bits", "value_bits")))
        ms = "{:.2f} ({:.2f}-{:.2f})".format(*(float(r[q]) for q in ("median_ms", "p10_ms", "p90_ms")))
        others = [run.get("torch-sdpa", run.get("torch-eager")), run.get("torch-sdpa-folded")]
        ratios = [f"{float(o['ratio']):.2f}" if o else "" for o in others]
        body.append([case, r["level"], f"{r['codec']} {bits}", ms, share(r), *ratios])
    head = ["case", "level", "codec, bits", "ms (10-90 %)", "of floor", "x torch"]
    return markdown([*head, "x torch, group as queries"], body)


def fold_table() -> str:
    """Folds of the newest commit that ran beside the scalar encoder, on machines whose best level is avx512-vnni."""
    body = []
    for run in cpu_runs("avx512-vnni", "scalar", "AMD"):
        r, scalar = run["kvfold"], run.get("scalar")
        if scalar is None:
            continue
        values = 2 * int(r["context"]) * int(r["kv_heads"]) * int(r["head_dim"])
        bits = ", ".join(dict.fromkeys(f"{float(r[side]):g}" for side in ("key_bits", "value_bits")))
        ms = "{:.1f} ({:.1f}-{:.1f})".format(*(float(r[q]) for q in ("median_ms", "p10_ms", "p90_ms")))
        ns = f"{1e6 * float(r['median_ms']) / values:.1f}"
        tokens = f"{int(r['context']):,} tokens, {r['kv_heads']} heads"
        body.append([tokens, r["level"], bits, ms, ns, f"{1 / float(scalar['ratio']):.1f}"])
    return markdown(["keys and values of", "level", "bits", "ms (10-90 %)", "ns per number", "x scalar"], body)


# Profiles on the CUDA engine, as bench/gpu/run.py calls their keys and values.
GPU_PROFILES = {"swift-3": "gg", "swift-2.5": "gh", "balanced": "ab", "compact": "cd", "turbo-3": "33"}


def gpu_decode_table() -> str:
    """A row per batch and context, a column per profile; the newest row of each."""
    shape = {"device": "NVIDIA H200", "lengths": "equal", "heads": "32", "kv_heads": "8", "dim": "128"}
    newest: dict[tuple[int, int], dict[str, Row]] = {}
    for r in read("gpu_decode"):
        if r["contender"] == "kvfold" and r["commit"] and all(r[f] == wanted for f, wanted in shape.items()):
            newest.setdefault((int(r["batch"]), int(r["tokens"])), {})[r["key"] + r["value"]] = r
    body = []
    for (batch, tokens), rows in sorted(newest.items()):
        cells = [rows[letters] for letters in GPU_PROFILES.values() if letters in rows]
        times = [f"{float(r['median_us']):.0f} us, {float(r['ratio']):.2f}x" for r in cells]
        if len(times) == len(GPU_PROFILES):
            body.append([f"batch {batch}, {tokens // 1024}k", *times])
    return markdown(["H200", *(f"`{p}`" for p in GPU_PROFILES)], body)


def distortion_table() -> str:
    body = []
    for r in read("distortion"):
        if option(r, "dim", "128") != "128":
            continue
        how = f", {option(r, 'scale', '')}, search {option(r, 'search', '1')}" if "--scale" in r["command"] else ""
        upper = f"{float(r['upper_bound']):.4f}" if r["upper_bound"] else "-"
        body.append(
            [r["codec"] + how, f"{float(r['bits']):g}", f"{float(r['bits_per_value']):.3f}", f"{float(r['mse']):.5f}"]
            + [f"{float(r['lower_bound']):.5f}", upper, f"{float(r['ip_slope']):.4f}"]
            + [f"{float(r['ip_variance_times_dim']):.4f}"]
        )
    head = ["codec", "bits", "stored bits", "mse", "Shannon", "paper's bound", "slope", "d · variance"]
    return markdown(head, body)


PLAN_PROFILES = ("faithful-3.5", "faithful-2.5", "balanced", "compact")


def plan_table() -> str:
    """A row per example, a column per profile."""
    cases: dict[tuple[str, int, int], dict[str, Row]] = {}
    for r in read("plan"):
        name = Path(r["command"].split()[2]).stem
        cases.setdefault((name, int(r["context"]), int(r["sessions"])), {})[r["profile"]] = r
    body = []
    for (name, context, sessions), rows in cases.items():
        first = rows["balanced"]
        gib = [f"{int(rows[p]['folded_bytes']) / 2**30:.2f}" for p in PLAN_PROFILES]
        state = f"{int(first['state_bytes']) / 2**20:.0f} MiB" if int(first["state_bytes"]) else "-"
        body.append([name, f"{context:,}", str(sessions), f"{int(first['reference_bytes']) / 2**30:.2f}", *gib, state])
    return markdown(["model", "context", "sessions", "16-bit", *PLAN_PROFILES, "state"], body)


TABLES: dict[str, Callable[[], str]] = {
    "eval": eval_table,
    "baselines": baselines_table,
    "trellis": trellis_table,
    "computed": computed_table,
    "legs": legs_table,
    "tune": tune_table,
    "by_layer": by_layer_table,
    "graded": graded_table,
    "needle": partial(needle_table, False),
    "needle_loss": needle_loss_table,
    "needle_kinds": partial(needle_table, True),
    "demo": demo_table,
    "memory": memory_table,
    "bench": bench_table,
    "cpu": partial(cpu_table, "amx"),
    "cpu_avx512": partial(cpu_table, "avx512-vnni", "AMD"),
    "cpu_avx512_intel": partial(cpu_table, "avx512-vnni", "Intel"),
    "cpu_avx2": partial(cpu_table, "avx2"),
    "cpu_fold": fold_table,
    "gpu_decode": gpu_decode_table,
    "distortion": distortion_table,
    "plan": plan_table,
}


def main(check: bool) -> None:
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = path.read_text(encoding="utf-8")
        after = re.sub(
            r"<!-- table: (\w+) -->\n.*?<!-- end -->",
            lambda m: f"<!-- table: {m[1]} -->\n{TABLES[m[1]]()}\n<!-- end -->",
            before,
            flags=re.DOTALL,
        )
        if check and before != after:
            sys.exit(f"{path.name}'s tables are not those of bench/results; run python scripts/tables.py")
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
