"""Whether vLLM on a GPU answers through kvfold as through its own cache. Prints, and writes gpu_vllm_check.csv.

    PYTHONPATH=src:SITE python bench/gpu/vllm_check.py [--profiles balanced,turbo-3] [--workers 1]

SITE: what vllm_site.py unpacked, or a vLLM that is installed. The shipped model, one engine per cache, all at once:

- `lossless`, float32: greedy ids beside stock's, each prompt alone, again with its prefix cached, all at once. Triton
  multiplies float32 in fewer bits than torch, so ids may part where two tokens are close: stock's own are compared too.
- profiles, float16: KL divergence over one window of 2,048 tokens in calls of 64, needles found at 4,096 tokens, and text;
  and eight answers at once that fill pages, by decode steps in whole CUDA graphs beside steps without graphs.
"""

from __future__ import annotations

import argparse
import csv
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "vllm"))
from engines import Run, prompt, run, step, text, tokenizer

from kvfold.bench.harness import commit
from kvfold.evaluation.divergence import CALL_TOKENS, compare
from kvfold.evaluation.needle import documents

LENGTHS = (70, 128, 300, 517, 800, 1100, 1500, 2100)
PROMPTS = [prompt(i, n) for i, n in enumerate(LENGTHS)]
WINDOW = text()[:2048]
NEEDLES = [
    (d.ids + n.question, n.answer) for d in documents(4096, ["magic_number"], 2, 0, tokenizer()) for n in d.needles
]


def same(workers: int) -> dict[str, Any]:
    """Arguments of `run` for the comparison of ids."""
    steps = [*(step(p) for p in PROMPTS), *(step(p) for p in PROMPTS), step(*PROMPTS)]
    return {"steps": steps, "tensor_parallel_size": workers, "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}}


def quality(workers: int) -> dict[str, Any]:
    read = step(WINDOW, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    ask = step(*(q for q, _ in NEEDLES), max_tokens=max(len(a) for _, a in NEEDLES))
    return {
        "steps": [read, ask, step(PROMPTS[-1], max_tokens=48)],
        "dtype": "float16",
        "max_model_len": 4096 + 64,
        "max_logprobs": -1,
        "max_num_batched_tokens": CALL_TOKENS,
        "max_num_seqs": 1,
        "tensor_parallel_size": workers,
        "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    }


def in_steps(workers: int, graphs: bool) -> dict[str, Any]:
    """Batches that shrink, so that a graph's last rows are no requests."""
    captured = {
        "enforce_eager": False,
        "compilation_config": {
            "custom_ops": ["none"],
            "mode": 3,
            "backend": "eager",
            "cudagraph_mode": "FULL_AND_PIECEWISE",
            "cudagraph_capture_sizes": [1, 4, 8],
        },
    }
    return {
        "steps": [step(*PROMPTS, max_tokens=160), step(*PROMPTS[:5], max_tokens=160)],
        "dtype": "float16",
        "tensor_parallel_size": workers,
        "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        **(captured if graphs else {}),
    }


def parted(ours: list[list[int]], stock: list[list[int]]) -> list[tuple[int, int]]:
    """(prompt, place) of the first differing token of every answer that differs."""
    return [
        (i, next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))))
        for i, (a, b) in enumerate(zip(ours, stock, strict=True))
        if a != b
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", default="balanced,turbo-3")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    given = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    jobs = {(None, "ids"): same(given.workers), ("lossless", "ids"): same(given.workers)}
    profiles = given.profiles.split(",")
    jobs |= {(p, "quality"): quality(given.workers) for p in (None, *profiles)}
    jobs |= {(p, kind): in_steps(given.workers, kind == "graphs") for p in profiles for kind in ("no graphs", "graphs")}
    done: dict[tuple[str | None, str], Run] = {}

    def work(key: tuple[str | None, str]) -> None:
        begin = time.perf_counter()
        try:
            done[key] = run(key[0], **jobs[key])
            print(f"{key}: {time.perf_counter() - begin:.0f} s, {done[key].engines or 'stock'}", flush=True)
        except Exception as error:  # noqa: BLE001 one that cannot run must not cost the others
            (given.out / f"vllm-check-{key[0]}-{key[1]}.log").write_text(str(error))
            print(f"{key} failed after {time.perf_counter() - begin:.0f} s: {str(error)[-1500:]}", flush=True)

    threads = [threading.Thread(target=work, args=[key]) for key in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    rows = []
    stock, ours = done.get((None, "ids")), done.get(("lossless", "ids"))
    if stock and ours:
        n = len(PROMPTS)
        expected = [stock.ids(i)[0] for i in range(n)]
        answers = {
            "alone": [ours.ids(i)[0] for i in range(n)],
            "prefix cached": [ours.ids(n + i)[0] for i in range(n)],
            "at once": ours.ids(2 * n),
            "stock, prefix cached": [stock.ids(n + i)[0] for i in range(n)],
            "stock, at once": stock.ids(2 * n),
        }
        for name, ids in answers.items():
            differ = parted(ids, expected)
            print(f"lossless ids, {name}: {n - len(differ)} of {n} equal; parted (prompt, place): {differ}", flush=True)
            rows.append(["lossless", name, f"{n - len(differ)} of {n} equal"])
        print("cached tokens", [ours.cached(n + i)[0] for i in range(n)], flush=True)
    stock = done.get((None, "quality"))
    for profile in (None, *profiles):
        got = done.get((profile, "quality"))
        if got is None:
            continue
        begin = len(rows)
        hits = sum(ids[: len(a)] == a for ids, (_, a) in zip(got.ids(1), NEEDLES, strict=True))
        rows.append([profile or "stock", "needles at 4096", f"{hits} of {len(NEEDLES)}"])
        if profile and stock:
            folded, own = (torch.from_numpy(r.logprobs[0, 0]) for r in (got, stock))
            rows.append([profile, "kld", f"{float(compare(folded, own)[0].mean()):.5f}"])
        print(profile or "stock", rows[begin:], repr(tokenizer().decode(got.ids(2)[0])), flush=True)
    for profile in profiles:
        plain, captured = done.get((profile, "no graphs")), done.get((profile, "graphs"))
        for i, n in enumerate((len(PROMPTS), 5)):
            if plain and captured:
                differ = parted(captured.ids(i), plain.ids(i))
                print(f"{profile}, {n} answers in graphs: parted (prompt, place) from those without: {differ}", flush=True)
                rows.append([profile, f"{n} answers in graphs, beside those without", f"{n - len(differ)} of {n} equal"])
    with (given.out / "gpu_vllm_check.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["date", "device", "torch", "workers", "cache", "what", "result", "commit"])
        common = [datetime.now(UTC).date(), device, torch.__version__, given.workers]
        out.writerows([*common, *row, commit()] for row in rows)


if __name__ == "__main__":
    main()
