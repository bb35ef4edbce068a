"""Decode attention and folding at 3 bits beside other projects' kernels, in one process, in turn. Writes gpu_peers.csv.

Run: python bench/gpu/peers.py [--vllm FOLDER] [--flashinfer FOLDER] [--shapes 16x32768,1x131072] [--out FOLDER]
--vllm: an unpacked vllm wheel (see vllm_turboquant.py). --flashinfer: a folder to import flashinfer from; without it, whatever
is installed. FlashInfer compiles its kernels on first use, which needs nvcc and ninja. What cannot run is named with its reason.
ratio: the contender's median over kvfold's.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rows import Rows, shape_of
from torch.nn.attention import SDPBackend
from vllm_turboquant import TurboQuant

from kvfold.bench import cuda_decode as cd
from kvfold.bench.cuda_timing import Captured, copy_bandwidth, rotations, time_interleaved

Calls = tuple[Sequence[Callable[[], object]], int]  # the same work on rotating inputs; bytes that one call must read
PAGE = 16  # tokens of FlashInfer's pages, its users' default
STORE_TOKENS = 65536


def kvfold_calls(shape: cd.Shape) -> Calls:
    batches = cd.folded_batches(cd.engine("3", "3", shape), shape)
    return cd.folded_calls(batches), batches[0].bytes


def sixteen_bit_calls(shape: cd.Shape, backend: SDPBackend) -> Calls:
    return cd.sixteen_bit_calls(shape, backend), 2 * shape.values


def flashinfer_calls(shape: cd.Shape, dtype: torch.dtype) -> Calls:
    import flashinfer

    b, n, h, d = len(shape.lengths), max(shape.lengths), shape.kv_heads, shape.dim
    pages = n // PAGE
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    step = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    first = torch.arange(b + 1, dtype=torch.int32, device="cuda") * pages
    order = torch.randperm(b * pages, device="cuda").int()
    last = torch.full((b,), PAGE, dtype=torch.int32, device="cuda")
    types = {"q_data_type": torch.bfloat16, "kv_data_type": dtype}
    step.plan(first, order, last, shape.heads, h, d, PAGE, **types)
    q = torch.randn(b, shape.heads, d, device="cuda", dtype=torch.bfloat16)
    size = shape.values * dtype.itemsize

    def cache() -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.randn(b * pages, PAGE, h, d, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2)
        )

    return [functools.partial(step.run, q, cache()) for _ in range(rotations(size))], size


def vllm_calls(shape: cd.Shape, folder: Path) -> Calls:
    layer = TurboQuant(folder, shape.kv_heads, shape.dim)
    print(f"  vllm-turboquant: output differs from exact attention by {layer.error(4096, 4):.3f}", flush=True)
    step, size = layer.filled(shape.lengths, shape.heads // shape.kv_heads)
    return [
        step,
        *(layer.filled(shape.lengths, shape.heads // shape.kv_heads)[0] for _ in range(rotations(size) - 1)),
    ], size


def compare(rows: Rows, shape: cd.Shape, makers: dict[str, Callable[[], Calls]]) -> None:
    """Prepare every contender, leave out with its reason what cannot run, time the others in turn."""
    ready: dict[str, Captured] = {}
    sizes: dict[str, int] = {}
    for name, make in makers.items():
        start = time.monotonic()
        try:
            calls, sizes[name] = make()
            ready[name] = Captured(calls)
        except Exception as error:  # noqa: BLE001 a peer that is absent or cannot be built must not cost the others
            print(f"  {name} cannot run: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        print(f"  {name} ready after {time.monotonic() - start:.1f} s", flush=True)
    timings = time_interleaved(ready)
    for name, t in timings.items():
        ratio = t.median / timings["kvfold"].median
        rows.add(shape, name, t, sizes[name], key="3", value="3", ratio=f"{ratio:.2f}")
        print(
            f"  {name}: {t.median:.1f} us, {sizes[name] / t.median / 1e6:.2f} TB/s, {ratio:.2f}x of kvfold",
            flush=True,
        )


def store(rows: Rows, folder: Path) -> None:
    """Fold STORE_TOKENS tokens, against vLLM's store of the same keys and values."""
    shape = cd.Shape((STORE_TOKENS,))
    k, v = torch.randn(2, STORE_TOKENS, shape.kv_heads, shape.dim, device="cuda", dtype=torch.bfloat16)
    e = cd.engine("3", "3", shape)
    pages = torch.empty(STORE_TOKENS // 128, e.page_bytes, dtype=torch.uint8, device="cuda")
    at = torch.arange(len(pages), device="cuda") * e.page_bytes + pages.data_ptr()
    at[0] |= 1  # a sequence's first page
    kp, vp = (x.unflatten(0, (-1, 128)).transpose(1, 2) for x in (k, v))
    layer = TurboQuant(folder, shape.kv_heads, shape.dim)
    cache, slots = layer.cache(STORE_TOKENS), torch.arange(STORE_TOKENS, dtype=torch.int32, device="cuda")
    timings = time_interleaved(
        {
            "kvfold fold": Captured([lambda: e.fold_to(kp, vp, at)]),
            "vllm-turboquant store": Captured([lambda: layer.store(k, v, cache, slots)]),
        }
    )
    for name, t in timings.items():
        ratio = t.median / timings["kvfold fold"].median
        rows.add(shape, name, t, 2 * shape.values, key="3", value="3", ratio=f"{ratio:.2f}")
        print(f"  {name}: {t.median:.1f} us, {ratio:.2f}x of kvfold", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--flashinfer", type=Path)
    parser.add_argument("--shapes", default="16x32768,1x131072")
    parser.add_argument("--skip", default="", help="contenders to leave out, by commas")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    if args.flashinfer:
        sys.path.insert(0, str(args.flashinfer))
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e12:.2f} TB/s", flush=True)
    rows = Rows(args.out, "gpu_peers.csv", copy)
    for text in args.shapes.split(","):
        print(text, flush=True)
        shape = shape_of(text)
        makers: dict[str, Callable[[], Calls]] = {"kvfold": functools.partial(kvfold_calls, shape)}
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            makers[name] = functools.partial(sixteen_bit_calls, shape, backend)
        for name, dtype in (("flashinfer", torch.bfloat16), ("flashinfer-fp8", torch.float8_e4m3fn)):
            makers[name] = functools.partial(flashinfer_calls, shape, dtype)
        if args.vllm:
            makers["vllm-turboquant"] = functools.partial(vllm_calls, shape, args.vllm)
        compare(rows, shape, {k: v for k, v in makers.items() if k not in args.skip.split(",")})
        torch.cuda.empty_cache()
    if args.vllm:
        store(rows, args.vllm)


if __name__ == "__main__":
    main()
