"""Very long sequences and very large page pools: the error of decode attention against float64. Writes gpu_long.csv.

Run: python bench/gpu/long_context.py [--tokens 32768,4194304] [--pool-bytes 70000000000] [--out FOLDER]
Keys and values are random, folded by the kernel; the reference is float64 attention, in tiles, over what the codec's own
float32 mathematics reads from the pages. plain_error: the same of a 16-bit kernel over those keys and values, whose double the
folded kernel may not exceed. In the pool the pages of 4 sequences lie in random places, the first and the last among them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rows import Rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvfold.bench import cuda_decode as cd
from kvfold.bench.cuda_timing import copy_bandwidth, time_launches
from kvfold.engine.cuda.arguments import sequence_words
from kvfold.engine.cuda.engine import CudaEngine

TILE = 512  # pages that are folded or unfolded at once
QUERY = 3.0  # deviation of the queries: scores of deviation 3, so that few of millions of tokens matter, as in a model
FLOOR = 2e-3  # one rounding of the output to bfloat16


class Sums:
    """Softmax attention over tiles, float64: q [H, G, D]."""

    def __init__(self, q: Tensor) -> None:
        self.q, self.top = (
            q.double() * q.shape[-1] ** -0.5,
            torch.full(q.shape[:2], -torch.inf, device=q.device).double(),
        )
        self.weight, self.out = torch.zeros_like(self.top), torch.zeros_like(self.q)

    def add(self, k: Tensor, v: Tensor) -> None:
        """k, v [H, T, D]."""
        x = self.q @ k.double().mT
        top = torch.maximum(self.top, x.amax(-1))
        p, old = (x - top[..., None]).exp(), (self.top - top).exp()
        self.weight = self.weight * old + p.sum(-1)
        self.out = self.out * old[..., None] + p @ v.double()
        self.top = top

    @property
    def result(self) -> Tensor:
        return self.out / self.weight[..., None]


def fold(e: CudaEngine, addresses: Tensor, seed: int) -> None:
    """Random keys and values into the pages at `addresses`."""
    torch.manual_seed(seed)
    for at in range(0, len(addresses), TILE):
        some = addresses[at : at + TILE].clone()
        some[0] |= int(at == 0)  # the sequence's first page
        k, v = torch.randn(2, len(some), e.shape.kv_heads, 128, e.shape.head_dim, device=e.device, dtype=torch.bfloat16)
        e.fold_to(k, v, some)


class Case:
    """Sequences whose pages are rows of `pool`; numbers: which rows, per sequence."""

    def __init__(self, e: CudaEngine, pool: Tensor, numbers: list[Tensor]) -> None:
        self.e, self.pool, self.numbers = e, pool, numbers
        h, d, spec, b = e.shape.kv_heads, e.shape.head_dim, e.spec, len(numbers)
        self.exact = torch.randn(b, 2, h, 64 + spec.sinks, d, device=e.device, dtype=torch.bfloat16)
        self.q = QUERY * torch.randn(b, 4 * h, 1, d, device=e.device, dtype=torch.bfloat16)
        self.k, self.v = torch.randn(2, b, h, 1, d, device=e.device, dtype=torch.bfloat16)
        self.tables, words = [], []
        for i, mine in enumerate(numbers):
            self.tables.append(mine * e.page_bytes + pool.data_ptr())
            fold(e, self.tables[-1], i)
            sinks = [x[:, : spec.sinks].contiguous() for x in self.exact[i]]
            recent = [x[:, spec.sinks :] for x in self.exact[i]]
            self.tables += sinks
            folded = 128 * len(mine)
            words.append(sequence_words(*recent, *sinks, self.tables[-3], folded + 64, folded, 0, 0, 64))
        self.sequences = torch.stack([torch.from_numpy(w) for w in words]).to(e.device)
        self.out = torch.full_like(self.q, torch.nan)

    def call(self) -> None:
        self.e.attend_rows(self.q, self.k, self.v, self.e.shape.head_dim**-0.5, self.sequences, self.out)

    def errors(self) -> tuple[float, float]:
        """(largest error of the kernel over sequences, that of a 16-bit kernel), relative to float64."""
        self.call()
        worst, plain = 0.0, 0.0
        h, d, sinks = self.e.shape.kv_heads, self.e.shape.head_dim, self.e.spec.sinks
        for i, mine in enumerate(self.numbers):
            sums = Sums(self.q[i].view(h, 4, d))
            n = 128 * len(mine) + 64 + 1
            dense = torch.empty(2, 1, h, n, d, device=self.e.device, dtype=torch.bfloat16)
            for at in range(0, len(mine), TILE):
                k, v = self.e.unfold(self.pool[mine[at : at + TILE]])
                if at == 0:
                    k[:, :sinks], v[:, :sinks] = (
                        self.exact[i, 0, :, :sinks].float(),
                        self.exact[i, 1, :, :sinks].float(),
                    )
                sums.add(k, v)
                dense[0, 0, :, 128 * at : 128 * at + k.shape[1]], dense[1, 0, :, 128 * at : 128 * at + k.shape[1]] = (
                    k,
                    v,
                )
            for side, new in ((0, self.k), (1, self.v)):
                dense[side, 0, :, n - 65 : n - 1], dense[side, 0, :, n - 1 :] = self.exact[i, side, :, sinks:], new[i]
            sums.add(dense[0, 0, :, n - 65 :], dense[1, 0, :, n - 65 :])
            want = sums.result.view(4 * h, 1, d)
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
                usual = torch.nn.functional.scaled_dot_product_attention(self.q[i : i + 1], *dense, enable_gqa=True)[0]
            worst = max(worst, float((self.out[i].double() - want).norm() / want.norm()))
            plain = max(plain, float((usual.double() - want).norm() / want.norm()))
        return worst, plain


def report(rows: Rows, case: Case, name: str) -> bool:
    """Measure, write a row; whether the error is allowed."""
    lengths = tuple(128 * len(x) + 65 for x in case.numbers)
    shape = cd.Shape(lengths, heads=4 * case.e.shape.kv_heads, kv_heads=case.e.shape.kv_heads)
    t = time_launches(case.call)
    error, plain = case.errors()
    fine = error <= 2 * plain + FLOOR
    size = sum(map(len, case.numbers)) * case.e.page_bytes
    figures = {"error": f"{error:.3g}", "plain_error": f"{plain:.3g}", "pool_bytes": case.pool.nbytes}
    rows.add(shape, name, t, size, key="3", value="3", **figures)
    print(f"{name}: {len(lengths)} x {max(lengths)} tokens in a pool of {case.pool.nbytes / 1e9:.1f} GB: error {error:.2e}, "
          f"16-bit kernel {plain:.2e}, {'within' if fine else 'ABOVE'} the bound; {t.median:.0f} us", flush=True)  # fmt: skip
    return fine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="32768,4194304")
    parser.add_argument("--pool-bytes", type=int, default=70_000_000_000)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    start, fine = time.monotonic(), True
    rows = Rows(args.out, "gpu_long.csv", copy_bandwidth(), ("error", "plain_error", "pool_bytes"))
    torch.cuda.empty_cache()
    e = cd.engine("3", "3", cd.Shape((1,)))
    for tokens in map(int, args.tokens.split(",")):
        pages = tokens // 128
        pool = torch.empty(pages, e.page_bytes, dtype=torch.uint8, device="cuda")
        fine &= report(rows, Case(e, pool, [torch.randperm(pages, device="cuda")]), "one sequence")
        del pool
        torch.cuda.empty_cache()
    if args.pool_bytes:
        count = args.pool_bytes // e.page_bytes
        pool = torch.empty(count, e.page_bytes, dtype=torch.uint8, device="cuda").fill_(0xA5)
        order = torch.randperm(count - 2, device="cuda")[: 4 * 256 - 2] + 1
        order = torch.cat([order, torch.tensor([0, count - 1], device="cuda")])
        fine &= report(rows, Case(e, pool, list(order.view(4, 256).flip(1))), "large pool")
    print(f"total {time.monotonic() - start:.1f} s", flush=True)
    if not fine:
        raise SystemExit("an error is above its bound")


if __name__ == "__main__":
    main()
