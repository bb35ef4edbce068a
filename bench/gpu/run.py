"""Verify and time the GPU engine in one go: python bench/gpu/run.py [--parts tests,decode,...] [--out FOLDER].

Prints short tables; writes CSV rows (gpu_decode.csv, gpu_fold.csv, ...) to the folder.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import sys
import time
import traceback
from pathlib import Path

import torch
from rows import Rows, shape_of
from torch.nn.attention import SDPBackend

from kvfold.bench import cuda_decode as cd
from kvfold.bench.cuda_timing import copy_bandwidth, time_calls
from kvfold.engine.cuda.driver import compile_cubin
from kvfold.engine.cuda.folding import parities_of
from kvfold.engine.cuda.formats import book_of

START = time.monotonic()


def baselines(rows: Rows, shape: cd.Shape) -> float:
    best = float("inf")
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            t = cd.time_sixteen_bit(shape, backend)
        except RuntimeError as e:
            print(name, "failed:", str(e)[:100])
            continue
        rows.add(shape, name, t, 2 * shape.values)
        best = min(best, t.median)
    torch.cuda.empty_cache()
    return best


def decode(rows: Rows, shape: cd.Shape, formats: list[str], extras: bool) -> None:
    best = baselines(rows, shape)
    if (
        len(set(shape.lengths)) > 1
    ):  # a padded 16-bit batch reads every row at full length; charge it for the real lengths only
        best *= sum(shape.lengths) / (len(shape.lengths) * max(shape.lengths))
    size = f"B{len(shape.lengths)} {max(shape.lengths) // 1024}k"
    label = f"{'scattered ' * shape.scattered}{size} {shape.heads}/{shape.kv_heads} D{shape.dim}"
    print(f"{label}: fastest 16-bit {best:.1f} us", flush=True)
    for fmt in formats:
        key, value = fmt[0], fmt[-1]
        e = cd.engine(key, value, shape)
        batches = cd.folded_batches(e, shape)
        columns = shape.heads // shape.kv_heads
        base = e.variant(columns)
        runs = [("kvfold", base, True)]
        if extras:
            runs += [
                ("kvfold, plain launch", base, False),
                ("loads only", (*base[:-1], 1), True),
                ("arithmetic only", (*base[:-1], 2), True),
                ("no exact part", (*base[:-1], 3), True),
            ]
            ampere = cd.engine(key, value, shape, bulk=False).variant(columns)
            runs.append(("cp.async", ampere, True))
        parts = []
        for name, variant, dependent in runs:
            t = cd.time_folded(batches, variant, dependent)
            rows.add(
                shape,
                name,
                t,
                batches[0].bytes,
                key=key,
                value=value,
                ratio=f"{best / t.median:.2f}",
                variant=" ".join(map(str, variant)),
            )
            parts.append(
                f"{name} {t.median:.1f}"
                + (
                    f" ({best / t.median:.2f}x, {batches[0].bytes / t.median / 1e6:.2f} TB/s)"
                    if name == "kvfold"
                    else ""
                )
            )
        print(f"  {fmt}: " + " | ".join(parts), flush=True)
        del batches
        torch.cuda.empty_cache()


def logits(rows: Rows, shape: cd.Shape, formats: list[str]) -> None:
    """Scores alone: packed keys against float32 ones (and bfloat16), torch's matrix product in full precision."""
    fastest = {}
    for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for order, calls in cd.exact_logits(shape, dtype).items():
            t = time_calls(calls)
            rows.add(shape, f"{short} matmul, {order}", t, shape.values // 2 * dtype.itemsize)
            fastest[short] = min(fastest.get(short, t.median), t.median)
        torch.cuda.empty_cache()
    exact = fastest["fp32"]
    size = f"B{len(shape.lengths)} {max(shape.lengths) // 1024}k"
    print(f"logits {size}: fp32 {exact:.1f} us, bf16 {fastest['bf16']:.1f} us", flush=True)
    for fmt in formats:
        e = cd.engine(fmt[0], fmt[-1], shape)
        batches = cd.folded_batches(e, shape)
        t = time_calls(cd.folded_logits(batches))
        region = e.fragments.half_bytes - e.fragments.sides["value"].bytes  # keys and mean of half a page
        nbytes = batches[0].slab.nbytes // e.fragments.head_bytes * 2 * region
        rows.add(shape, "kvfold", t, nbytes, key=fmt[0], value=fmt[-1], ratio=f"{exact / t.median:.2f}")
        print(f"  {fmt}: {t.median:.1f} us ({exact / t.median:.2f}x, {nbytes / t.median / 1e6:.2f} TB/s)", flush=True)
        del batches
        torch.cuda.empty_cache()


def test_variants() -> list[tuple[str, tuple[int, ...]]]:
    """What the tests will ask for, so that all of it can be compiled side by side."""
    from kvfold.engine.cuda.arguments import WARPS, plan_rings

    out: list[tuple[str, tuple[int, ...]]] = []
    trellis = ((17, 15), (16, 14), (15, 13), (14, 12), (13, 17), (12, 16), (16, 4), (3, 14))
    computed = ((26, 24), (24, 26), (26, 26), (24, 24), (26, 15), (24, 3), (1, 26))
    for dim in (64, 128, 256):
        out += [("viterbi.cu", (dim, *w)) for w in ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4))]
        for k, v in (*trellis[:6], *computed[:5]):  # both sides trellis codes
            for centre, half in ((1, 0), (0, 1)):
                for side, fmt in enumerate((k, v)):
                    parities = parities_of(book_of(fmt))
                    out.append(("fold_trellis.cu", (dim, k, v, centre, half, side, *parities)))
        for k, v in (*trellis, *computed, (17, 17), (14, 14)):
            out += [("unfold.cu", (dim, k, v, 1, 0)), ("unfold.cu", (dim, k, v, 0, 1))]
        for k, v in itertools.product((4, 3, 2, 1), repeat=2):
            out += [("fold.cu", (dim, k, v, 1, 0)), ("fold.cu", (dim, k, v, 0, 1))]
        for d, groups in WARPS:
            for k, v in ((4, 4), (3, 3), (2, 2), (1, 1), (4, 3), (3, 1), (1, 4), *trellis, *computed):
                for bulk, half in ((1, 0), (0, 0), (1, 1), (0, 1)):
                    if d == dim and not (half and groups > 1):
                        warps, slots = plan_rings(dim, (k, v), True, groups, 232448)
                        out.append(("decode.cu", (dim, k, v, 1, groups, warps, slots, bulk, half, 0)))
    return out


def compile_all() -> None:
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    with concurrent.futures.ProcessPoolExecutor(16, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compile_cubin, name, variant, arch) for name, variant in test_variants()]
        for job in jobs:
            job.result()
    print(f"compiled {len(jobs)} variants, {time.monotonic() - START:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="tests,decode")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--formats", default="4,3,u,2")
    parser.add_argument("--shapes", default="1x32768,1x131072,16x32768,16x131072")
    parser.add_argument("--only", default="", help="tests whose names fit this expression of pytest's -k")
    parser.add_argument("--extras", action="store_true", help="also time parts of the kernel and the cp.async path")
    args = parser.parse_args()
    parts = args.parts.split(",")
    torch.manual_seed(time.time_ns() % 2**31)
    if "compile" in parts:
        compile_all()
    if "tests" in parts:
        import pytest

        code = pytest.main(
            [
                "-q",
                "--maxfail=8",
                "--no-header",
                "-p",
                "no:cacheprovider",
                "--tb=short",
                *(["-k", args.only] if args.only else []),
                "--durations=5",
                "tests/kernels/test_cuda_engine.py",
                "tests/kernels/test_cuda_graph.py",
            ]
        )
        print(f"tests: exit {code}, {time.monotonic() - START:.1f} s", flush=True)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e12:.2f} TB/s", flush=True)
    if "decode" in parts:
        rows = Rows(args.out, "gpu_decode.csv", copy)
        for text in args.shapes.split(","):
            try:
                decode(rows, shape_of(text), args.formats.split(","), extras=args.extras)
            except Exception:  # noqa: BLE001 a failed shape must not lose the others; the trace is printed
                traceback.print_exc()
                sys.stdout.flush()
    if "logits" in parts:
        rows = Rows(args.out, "gpu_logits.csv", copy)
        for text in args.shapes.split(","):
            logits(rows, shape_of(text), args.formats.split(","))
    if "fold" in parts:
        rows = Rows(args.out, "gpu_fold.csv", copy)
        for fmt, search, dim in (
            ("3", 1, 128),
            ("3", 3, 128),
            ("4", 3, 128),
            ("u", 3, 128),
            ("3", 3, 64),
            ("3", 3, 256),
            ("ab", 1, 128),
            ("cd", 1, 128),
            ("be", 1, 128),
            ("df", 1, 128),
            ("ab", 1, 256),
        ):
            shape = cd.Shape((65536,), dim=dim)
            key, value = fmt[0], fmt[-1]
            t = cd.time_fold(cd.engine(key, value, shape, search=search), 512)
            rows.add(shape, "kvfold", t, 2 * shape.values, key=key, value=value, variant=f"search {search}")
            rate = 2 * shape.values / t.median / 1e6
            print(
                f"fold {fmt} search {search} D{dim}: {t.median:.1f} us, {rate:.2f} TB/s, {rate * 1e12 / copy:.2f} of copy",
                flush=True,
            )
    if "prefill" in parts:
        rows = Rows(args.out, "gpu_prefill.csv", copy)
        for fmt, prefix, new in (("3", 65536, 4096), ("4", 65536, 4096), ("u", 131072, 2048)):
            shape = cd.Shape((prefix + new,))
            mine, flash = cd.time_prefill(cd.engine(fmt, fmt, shape), prefix, new, 32)
            for name, t in (("kvfold", mine), ("flash", flash)):
                ratio = f"{flash.median / t.median:.3f}"
                rows.add(
                    shape, name, t, 2 * shape.values, key=fmt, value=fmt, ratio=ratio, variant=f"{new} new on {prefix}"
                )
            print(f"prefill {fmt}: {new} on {prefix}: {mine.median:.0f} us, flash {flash.median:.0f} us", flush=True)
        for fmt, search, new in (("3", 3, 8192), ("3", 3, 32768), ("4", 1, 8192), ("ab", 1, 8192), ("ab", 1, 32768)):
            shape = cd.Shape((new,))
            e = cd.engine(fmt[0], fmt[-1], shape, search=search)
            for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
                both, alone = cd.time_first_chunk(e, new, 32, backend)
                ratio = f"{alone.median / both.median:.3f}"
                for contender, t in ((f"{name} and fold", both), (name, alone)):
                    rows.add(
                        shape, contender, t, 2 * shape.values, key=fmt[0], value=fmt[-1], ratio=ratio,
                        variant=f"first {new}, search {search}",
                    )  # fmt: skip
                print(
                    f"first {new} tokens, {fmt} search {search}: {name} {alone.median:.0f} us, with fold {ratio}x",
                    flush=True,
                )
    print(f"total {time.monotonic() - START:.1f} s")


if __name__ == "__main__":
    main()
